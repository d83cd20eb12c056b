/* Runs kernels for tests on an emulated machine. Reads requests from standard input, answers on standard output:
 *
 *   uint32 kernel, memories, arguments, spans
 *   for each memory:    uint64 bytes, uint64 address modulo 64      then the bytes of all memories
 *   for each argument:  int64 memory (-1: null), uint64 offset
 *   for each span:      int32 begin, end
 *
 * The first answer, to nothing, is one byte: the program is loaded. Then each is the bytes of all memories after the kernel ran over all spans.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef void kernel(void *, void *, void *, void *, void *, void *, void *, void *, int32_t, int32_t);
extern kernel *const kernels[];

static void get(void *into, size_t bytes) {
    if (bytes && fread(into, bytes, 1, stdin) != 1) exit(feof(stdin) ? 0 : 1);
}

int main(void) {
    putchar('!');
    fflush(stdout);
    for (;;) {
        uint32_t head[4];
        get(head, sizeof head);
        uint64_t (*sizes)[2] = calloc(head[1] + 1, sizeof *sizes);
        unsigned char **blocks = calloc(head[1] + 1, sizeof *blocks), **memories = calloc(head[1] + 1, sizeof *memories);
        void *arguments[8] = {0};
        get(sizes, head[1] * sizeof *sizes);
        for (uint32_t i = 0; i < head[1]; i++) {
            blocks[i] = aligned_alloc(64, (sizes[i][0] + 191) / 64 * 64);
            memories[i] = blocks[i] + sizes[i][1];
            get(memories[i], sizes[i][0]);
        }
        for (uint32_t i = 0; i < head[2]; i++) {
            int64_t place[2];
            get(place, sizeof place);
            arguments[i] = place[0] < 0 ? NULL : memories[place[0]] + place[1];
        }
        for (uint32_t i = 0; i < head[3]; i++) {
            int32_t span[2];
            get(span, sizeof span);
            kernels[head[0]](
                arguments[0], arguments[1], arguments[2], arguments[3], arguments[4], arguments[5], arguments[6],
                arguments[7], span[0], span[1]
            );
        }
        for (uint32_t i = 0; i < head[1]; i++) {
            if (sizes[i][0] && fwrite(memories[i], sizes[i][0], 1, stdout) != 1) exit(1);
            free(blocks[i]);
        }
        fflush(stdout);
        free(sizes);
        free(blocks);
        free(memories);
    }
}
