/* weights.bin, from memory or from a file, compared with what the code expects.
 *
 * Little-endian: a header of 64 bytes
 *      0  8  "SPARSECW"
 *      8  4  format version, SPARSEC_WEIGHTS_FORMAT
 *     12  4  header bytes, 64
 *     16  8  payload bytes
 *     24  8  checksum of the payload
 *     32 32  digest: the same in the code that belongs to these weights
 * then the payload, exactly to the end. Every header byte is compared with what this code expects.
 */
#define _GNU_SOURCE
#include "internal.h"
#include "platform.h"

#define HEADER_BYTES 64

typedef struct header {
    char magic[8];
    uint32_t version;
    uint32_t header_bytes;
    uint64_t payload_bytes;
    uint64_t checksum;
    unsigned char digest[SPARSEC_DIGEST];
} header;

_Static_assert(sizeof(header) == HEADER_BYTES, "the header has no padding");

void *sparsec_align(void *pointer) {
    size_t past = (size_t)((uintptr_t)pointer % SPARSEC_ALIGNMENT);
    return (unsigned char *)pointer + (past ? SPARSEC_ALIGNMENT - past : 0);
}

/* sum over i of word[i] * K^(count - 1 - i) + K^count, modulo 2^64, over 32-bit words. K generates the largest cyclic
   group there is, so that a change of one word, or the same bit flipped in two words, always shows. */
static uint64_t checksum(const unsigned char *payload, size_t bytes) {
    const uint64_t k1 = 0x9e3779b97f4a7c15U, k2 = k1 * k1, k3 = k2 * k1, k4 = k3 * k1;
    uint64_t sum = 1;
    for (size_t i = 0; i + 16 <= bytes; i += 16) { /* four steps of sum = sum * K + word at once */
        uint32_t word[4];
        memcpy(word, payload + i, sizeof word);
        sum = sum * k4 + word[0] * k3 + word[1] * k2 + word[2] * k1 + word[3];
    }
    return sum;
}

/* `weights` [bytes], 64-byte aligned: is it what this code belongs to? */
static int check(const unsigned char *weights, size_t bytes) {
    header h;
    if (bytes < sizeof h) return SPARSEC_BAD_WEIGHTS;
    memcpy(&h, weights, sizeof h);
    if (memcmp(h.magic, "SPARSECW", sizeof h.magic) != 0) return SPARSEC_BAD_WEIGHTS;
    if (h.version != SPARSEC_WEIGHTS_FORMAT) return SPARSEC_VERSION;
    if (h.header_bytes != HEADER_BYTES) return SPARSEC_BAD_WEIGHTS;
    if (h.payload_bytes != sparsec_program.weights_bytes) return SPARSEC_BAD_WEIGHTS;
    if (bytes - sizeof h != sparsec_program.weights_bytes) return SPARSEC_BAD_WEIGHTS;
    if (memcmp(h.digest, sparsec_program.digest, SPARSEC_DIGEST) != 0) return SPARSEC_BAD_WEIGHTS;
    if (h.checksum != checksum(weights + sizeof h, sparsec_program.weights_bytes)) return SPARSEC_BAD_WEIGHTS;
    return SPARSEC_OK;
}

int sparsec_weights_given(sparsec_weights *result, const void *weights, size_t bytes) {
    *result = (sparsec_weights){0};
    if (!weights && !bytes && sparsec_program.embedded) {
        weights = sparsec_program.embedded;
        bytes = sparsec_program.embedded_bytes;
    }
    if (!weights) return SPARSEC_BAD_ARGUMENT;
    const unsigned char *aligned = weights;
    if ((uintptr_t)weights % SPARSEC_ALIGNMENT) {
        if (bytes != HEADER_BYTES + sparsec_program.weights_bytes) return SPARSEC_BAD_WEIGHTS;
        result->copy = malloc(bytes + SPARSEC_ALIGNMENT);
        if (!result->copy) return SPARSEC_NO_MEMORY;
        aligned = memcpy(sparsec_align(result->copy), weights, bytes);
    }
    int code = check(aligned, bytes);
    if (code) {
        sparsec_weights_release(result);
    } else {
        result->payload = aligned + HEADER_BYTES;
    }
    return code;
}

#ifdef SPARSEC_NO_FILES
int sparsec_weights_mapped(sparsec_weights *result, const char *path) {
    (void)path;
    *result = (sparsec_weights){0};
    return SPARSEC_IO;
}

static void unmap(sparsec_weights *weights) {
    (void)weights;
}
#else
int sparsec_weights_mapped(sparsec_weights *result, const char *path) {
    *result = (sparsec_weights){0};
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return SPARSEC_IO;
    long end = (long)lseek(file, 0, SEEK_END); /* a directory or a pipe fails here or below */
    if (end < 0 || (unsigned long)end != HEADER_BYTES + sparsec_program.weights_bytes) {
        close(file);
        return end < 0 ? SPARSEC_IO : SPARSEC_BAD_WEIGHTS;
    }
    size_t bytes = (size_t)end;
    void *mapping = mmap(NULL, bytes, PROT_READ, MAP_PRIVATE, file, 0);
    close(file);
    if (mapping == MAP_FAILED) return SPARSEC_IO;
    result->mapping = mapping;
    result->mapping_bytes = bytes;
    int code = check(mapping, bytes);
    if (code) {
        sparsec_weights_release(result);
    } else {
        result->payload = (const unsigned char *)mapping + HEADER_BYTES;
    }
    return code;
}

static void unmap(sparsec_weights *weights) {
    if (weights->mapping) munmap(weights->mapping, weights->mapping_bytes);
}
#endif

void sparsec_weights_release(sparsec_weights *weights) {
    unmap(weights);
    free(weights->copy);
    *weights = (sparsec_weights){0};
}
