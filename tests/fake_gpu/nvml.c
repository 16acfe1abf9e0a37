/* A libnvidia-ml.so.1 for tests: says how many GPUs there are from the file that $FAKE_GPUS names. None, no driver. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, NOT_LOADED = 9 };

static int count(void) {
    const char *path = getenv("FAKE_GPUS");
    FILE *file = path ? fopen(path, "r") : NULL;
    int found = 0;
    if (file) {
        if (fscanf(file, "%d", &found) != 1)
            found = 0;
        fclose(file);
    }
    return found;
}

int nvmlInit(void) { return count() > 0 ? OK : NOT_LOADED; }
int nvmlInit_v2(void) { return nvmlInit(); }
int nvmlShutdown(void) { return OK; }

int nvmlDeviceGetCount_v2(unsigned *out) {
    *out = (unsigned)count();
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **out) {
    *out = (void *)(size_t)(index + 1);
    return OK;
}

int nvmlDeviceGetUUID(void *device, char *out, unsigned size) {
    snprintf(out, size, "GPU-0000000%u-0000-0000-0000-000000000000", (unsigned)(size_t)device - 1);
    return OK;
}
