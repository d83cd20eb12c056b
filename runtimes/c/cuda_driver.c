/* Finding the CUDA driver, and what its errors are called. */
#define _GNU_SOURCE
#include "cuda_driver.h"

#include <dlfcn.h>

#include "platform.h"

int sparsec_driver_say(const sparsec_driver *driver, int code, const char *const pieces[]) {
    if (!driver->message || !driver->message_bytes) return code;
    size_t used = 0;
    for (; *pieces; pieces++) {
        for (const char *c = *pieces; *c && used + 1 < driver->message_bytes; c++) {
            driver->message[used++] = *c == '\n' || *c == '\r' ? ' ' : *c;
        }
    }
    driver->message[used] = 0;
    return code;
}

#define SAY(driver, code, ...) sparsec_driver_say(driver, code, (const char *const[]){__VA_ARGS__, NULL})

int sparsec_driver_code(const sparsec_driver *driver, CUresult result, const char *what) {
    if (!result) return SPARSEC_OK;
    const char *name = NULL, *text = NULL;
    if (driver->cuGetErrorName(result, &name) || !name) name = "unknown error";
    if (driver->cuGetErrorString(result, &text) || !text) text = "no description";
    return SAY(driver, result == CUDA_ERROR_OUT_OF_MEMORY ? SPARSEC_NO_MEMORY : SPARSEC_DEVICE, what, ": ", name, ": ",
               text);
}

/* A function pointer out of a data pointer, as POSIX promises. */
static void find(void *library, const char *symbol, void *function) {
    void *found = dlsym(library, symbol);
    memcpy(function, &found, sizeof found);
}

int sparsec_driver_load(sparsec_driver *driver) {
    /* Kept in the process once it is there: a driver has threads of its own and does not expect to be unmapped. */
    driver->library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (!driver->library) {
        const char *reason = dlerror();
        return SAY(driver, SPARSEC_DEVICE, "no CUDA driver: ", reason ? reason : "libcuda.so.1 cannot be loaded");
    }
#define X(symbol, parameters)                                                                     \
    find(driver->library, #symbol, &driver->symbol);                                              \
    if (!driver->symbol) return SAY(driver, SPARSEC_DEVICE, "the CUDA driver is too old: it has no ", #symbol);
    SPARSEC_DRIVER_NEEDED(X)
#undef X
#define X(symbol, parameters) find(driver->library, #symbol, &driver->symbol);
    SPARSEC_DRIVER_GRAPHS(X)
    SPARSEC_DRIVER_NEWER(X)
#undef X
    return SPARSEC_CALL(driver, cuInit, 0);
}

void sparsec_driver_unload(sparsec_driver *driver) {
    if (driver->library) dlclose(driver->library);
    driver->library = NULL;
}
