"""The code in docs/android.md compiles and links against what `build` makes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import hand_programs

from sparsec.building import elf
from sparsec.building.build import ANDROID_LIBC, build
from sparsec.targets import find_target

PAGE = (Path(__file__).parents[2] / "docs" / "android.md").read_text(encoding="utf-8")

# The part of the NDK's jni.h that the page uses.
JNI = """
#include <stdint.h>
typedef int32_t jint; typedef int64_t jlong; typedef void *jobject; typedef jobject jclass; typedef jobject jstring;
typedef const struct JNINativeInterface *JNIEnv;
struct JNINativeInterface {
    const char *(*GetStringUTFChars)(JNIEnv *, jstring, unsigned char *);
    void (*ReleaseStringUTFChars)(JNIEnv *, jstring, const char *);
    void *(*GetDirectBufferAddress)(JNIEnv *, jobject);
    jlong (*GetDirectBufferCapacity)(JNIEnv *, jobject);
};
#define JNIEXPORT __attribute__((visibility("default")))
#define JNICALL
"""


def test_jni_code_compiles_and_links(tmp_path):
    build(hand_programs.program(find_target("arm")), tmp_path, name="mobilenet")
    (code,) = re.findall(r"```c\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "classifier.c").write_text(code)
    (tmp_path / "jni.h").write_text(JNI)
    flags = ["-target", "aarch64-linux-android", "-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-I."]
    command = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        *flags,
        "-fPIC",
        "-fno-sanitize=all",
        "-fno-stack-protector",
        "-c",
        "classifier.c",
    ]
    subprocess.run([*command, "-o", "classifier.o"], cwd=tmp_path, check=True)
    command = [sys.executable, "-m", "ziglang", "cc", *flags[:2], "-shared", "-nostdlib", "-s", "-Wl,-z,undefs"]
    subprocess.run([*command, "classifier.o", "libmodel.a", "-o", "classifier.so"], cwd=tmp_path, check=True)
    symbols = elf.symbols((tmp_path / "classifier.so").read_bytes(), dynamic=True)
    exported = {symbol.name for symbol in symbols if symbol.defined}
    assert exported == {f"Java_com_example_Classifier_{name}" for name in ("open", "run", "close")}
    assert {symbol.name for symbol in symbols if not symbol.defined} <= ANDROID_LIBC
