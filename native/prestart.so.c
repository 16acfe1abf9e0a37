/* A program that waits at the door of its main(): loaded, linked and initialised, but not told yet what to do.
 *
 * Preloaded into a dynamically linked program. Standard input is a socket or pipe whose other end sends, once:
 *     u32 bytes, u32 arguments, u32 variables, then so many bytes: each argument, then each variable, NUL-terminated.
 * These replace the arguments and the environment the program was started with. If the other end is closed instead,
 * the program never runs. libc only.
 */
#include <dlfcn.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern char **environ;
typedef int entry(int, char **, char **);

static entry *program;

static void read_all(void *to, size_t size)
{
    while (size) {
        ssize_t n = read(0, to, size);
        if (n <= 0)
            _exit(126);
        to = (char *)to + n;
        size -= (size_t)n;
    }
}

static int wait_and_run(int argc, char **argv, char **envp)
{
    (void)argc, (void)argv, (void)envp;
    struct { uint32_t bytes, arguments, variables; } head;
    read_all(&head, sizeof head);
    if (!head.bytes || head.bytes > 1 << 20 || !head.arguments || head.arguments > 4096 || head.variables > 4096)
        _exit(126);
    char *text = malloc(head.bytes), **list = calloc(head.arguments + head.variables + 2, sizeof *list);
    if (!text || !list)
        _exit(126);
    read_all(text, head.bytes);
    char *at = text, *end = text + head.bytes;
    for (uint32_t i = 0; i < head.arguments + head.variables; i++) {
        char *stop = memchr(at, 0, (size_t)(end - at));
        if (!stop)
            _exit(126);
        list[i + (i >= head.arguments)] = at;
        at = stop + 1;
    }
    int null = open("/dev/null", O_RDONLY);
    if (null < 0 || dup2(null, 0) < 0)
        _exit(126);
    close(null);
    environ = list + head.arguments + 1;
    return program((int)head.arguments, list, environ);
}

int __libc_start_main(entry *main, int argc, char **argv, void (*init)(void), void (*fini)(void), void (*ld)(void),
                      void *stack);

int __libc_start_main(entry *main, int argc, char **argv, void (*init)(void), void (*fini)(void), void (*ld)(void),
                      void *stack)
{
    typeof(__libc_start_main) *real = (typeof(real))dlsym(RTLD_NEXT, "__libc_start_main");
    if (!real)
        _exit(126);
    program = main;
    return real(wait_and_run, argc, argv, init, fini, ld, stack);
}
