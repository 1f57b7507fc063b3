/* A stand-in for NVIDIA's management library (NVML), for machines without a GPU.

   It exports the functions of libnvidia-ml.so.1 that the runtime calls through pynvml, with their error codes. The GPUs, their clocks,
   energy counters and faults lie in the file that the environment variable NVML_STANDIN names. All processes map this file, so a clock
   that one process locks is in force for all, and stays in force when that process is killed, as in a real driver.

   A GPU computes when a program calls standin_begin: it is busy for the seconds that the work takes at the clock in force, and takes
   idle_w otherwise. Seconds and watts by clock are those of a measured sweep (`sweep_*`, straight lines between its clocks); a GPU without
   one takes T (beta fmax / f + 1 - beta) seconds and static_w + dynamic_w (f / fmax)^3 watts.

   As in NVML there is no function that reads a locked range: only the clock in force, and the reasons for it. A GPU becomes idle also
   within a locked range that begins at its idle clock. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define GPUS 16
#define CLOCKS 128
#define PROCESSES 16
#define SWEPT 16
#define XIDS 8

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6, SMALL = 7, NO_DRIVER = 9, TIMEOUT = 10, LOST = 15 };
enum { GRAPHICS = 0, SM = 1, MEMORY = 2 };
enum { REASON_IDLE = 0x1, REASON_SETTING = 0x2, REASON_POWER_CAP = 0x4, REASON_THERMAL = 0x20 };
enum { ANYBODY = 0, NOBODY = 1, ROOT = 2 };
enum { READS_WELL = 0, READS_NEGATIVE = 1, READS_FROZEN = 2, READS_NOTHING = 3 };

/* `examples/nvml_standin.py` has the same structures. */
struct gpu {
    char uuid[96], name[64];
    uint32_t memory_count, memory[4], graphics_count, graphics[CLOCKS]; /* MHz, descending */
    uint32_t application_mhz, idle_mhz, locked_min, locked_max, memory_locked_min, memory_locked_max, thermal_mhz, power_limit_mw;
    uint32_t may_set, fails, mig, power_reads, energy_reads, counter_bits, process_count, processes[PROCESSES];
    uint32_t switch_ms, sets, resets, works, boosts; /* boosts: it runs above its application clock, as many GPUs do */
    uint32_t no_ecc, no_xids, ecc_corrected, ecc_uncorrected, retired[2], remapped, xid_count, xids[XIDS];
    double idle_w, static_w, dynamic_w, busy_until, accrued_at, energy_j, frozen_w, slower;
    double sweep_mhz[SWEPT], sweep_stretch[SWEPT], sweep_w[SWEPT]; /* by descending clock; 0 MHz ends them; stretch: multiples of T */
};

struct state {
    uint32_t magic, gone, count, calls;
    struct gpu gpus[GPUS];
};

static struct state *state;
static int file = -1, inits;
static pid_t owner;
static char path[4096];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

/* Maps the state file; again after a fork, because a lock of an open file is shared with the parent, and if the variable has changed. */
static int attached(void) {
    const char *wanted = getenv("NVML_STANDIN");
    if (wanted == NULL) return NO_DRIVER;
    if (state != NULL && owner == getpid() && strcmp(wanted, path) == 0) return OK;
    if (state != NULL && owner == getpid()) { munmap(state, sizeof *state); close(file); }
    state = NULL;
    if (owner != getpid()) pthread_mutex_init(&mutex, NULL);
    file = open(wanted, O_RDWR | O_CLOEXEC);
    if (file < 0) return errno == EACCES ? NO_PERMISSION : NO_DRIVER;
    void *memory = mmap(NULL, sizeof *state, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (memory == MAP_FAILED) { close(file); return NO_DRIVER; }
    state = memory, owner = getpid();
    strncpy(path, wanted, sizeof path - 1);
    return OK;
}

static void enter(void) {
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    pthread_mutex_lock(&mutex);
    while (fcntl(file, F_OFD_SETLKW, &whole) < 0 && errno == EINTR) {}
}

static void leave(void) {
    struct flock whole = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    fcntl(file, F_OFD_SETLK, &whole);
    pthread_mutex_unlock(&mutex);
}

/* The value of a sweep at a clock: on a straight line between the two that were measured next to it. */
static double swept(const struct gpu *gpu, const double *values, double mhz) {
    int at = 0;
    while (at + 2 < SWEPT && gpu->sweep_mhz[at + 2] > 0 && gpu->sweep_mhz[at + 1] > mhz) at++;
    double share = (gpu->sweep_mhz[at] - mhz) / (gpu->sweep_mhz[at] - gpu->sweep_mhz[at + 1]);
    share = share < 0 ? 0 : share > 1 ? 1 : share;
    return values[at] + share * (values[at + 1] - values[at]);
}

static double busy_w(const struct gpu *gpu, uint32_t mhz) {
    if (gpu->sweep_mhz[0] > 0) return swept(gpu, gpu->sweep_w, mhz);
    double share = (double)mhz / gpu->graphics[0];
    return gpu->static_w + gpu->dynamic_w * share * share * share;
}

/* The clock under load, and why it is no higher: the locked range or the application clock, heat, then the power limit. */
static uint32_t running_mhz(const struct gpu *gpu, unsigned long long *reasons) {
    uint32_t usual = gpu->boosts ? gpu->graphics[0] : gpu->application_mhz, most = gpu->locked_max ? gpu->locked_max : usual, at = 0;
    unsigned long long why = most < gpu->graphics[0] ? REASON_SETTING : 0;
    while (at + 1 < gpu->graphics_count && gpu->graphics[at] > most) at++;
    if (gpu->thermal_mhz) for (; at + 1 < gpu->graphics_count && gpu->graphics[at] > gpu->thermal_mhz; at++) why = REASON_THERMAL;
    if (gpu->power_limit_mw)
        for (; at + 1 < gpu->graphics_count && 1000 * busy_w(gpu, gpu->graphics[at]) > gpu->power_limit_mw; at++) why = REASON_POWER_CAP;
    if (reasons) *reasons = why;
    return gpu->graphics[at];
}

static void accrue(struct gpu *gpu, double at) {
    if (at <= gpu->accrued_at) return;
    double until = gpu->busy_until < at ? gpu->busy_until : at;
    double busy_s = until > gpu->accrued_at ? until - gpu->accrued_at : 0;
    double used_j = busy_s * busy_w(gpu, running_mhz(gpu, NULL)) + (at - gpu->accrued_at - busy_s) * gpu->idle_w;
    if (gpu->energy_reads != READS_FROZEN) gpu->energy_j += used_j;
    gpu->accrued_at = at;
}

static int found(void *handle, struct gpu **gpu) {
    int code = attached();
    if (code != OK) return code;
    if (state->gone || !inits) return UNINITIALIZED;
    uintptr_t number = (uintptr_t)handle;
    if (number < 1 || number > state->count) return INVALID;
    *gpu = &state->gpus[number - 1];
    __atomic_fetch_add(&state->calls, 1, __ATOMIC_RELAXED);
    return (*gpu)->fails;
}

#define FIND(handle) struct gpu *gpu; int code = found(handle, &gpu); if (code != OK) return code

int nvmlInitWithFlags(unsigned flags) {
    (void)flags;
    int code = attached();
    if (code != OK) return code;
    if (state->gone) return NO_DRIVER;
    inits++;
    return OK;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void) {
    if (!inits) return UNINITIALIZED;
    inits--;
    return OK;
}

const char *nvmlErrorString(int code) { return code == LOST ? "GPU is lost" : code == NO_PERMISSION ? "Insufficient Permissions" : "Error"; }

static int text(char *to, unsigned size, const char *from) {
    if (strlen(from) >= size) return SMALL;
    strcpy(to, from);
    return OK;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size) { return text(version, size, "0.stand-in"); }

int nvmlDeviceGetCount_v2(unsigned *count) {
    int code = attached();
    if (code != OK) return code;
    if (state->gone || !inits) return UNINITIALIZED;
    *count = state->count;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    unsigned count;
    int code = nvmlDeviceGetCount_v2(&count);
    if (code != OK) return code;
    if (index >= count) return INVALID;
    *handle = (void *)(uintptr_t)(index + 1);
    return state->gpus[index].fails;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
    unsigned count;
    int code = nvmlDeviceGetCount_v2(&count);
    for (unsigned index = 0; code == OK && index < count; index++)
        if (strcmp(state->gpus[index].uuid, uuid) == 0) return nvmlDeviceGetHandleByIndex_v2(index, handle);
    return code == OK ? NOT_FOUND : code;
}

int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned size) { FIND(handle); return text(uuid, size, gpu->uuid); }

int nvmlDeviceGetName(void *handle, char *name, unsigned size) { FIND(handle); return text(name, size, gpu->name); }

static int listed(const uint32_t *from, uint32_t there, unsigned *count, unsigned *to) {
    if (to == NULL || *count < there) { *count = there; return there ? SMALL : OK; }
    memcpy(to, from, there * sizeof *from);
    *count = there;
    return OK;
}

int nvmlDeviceGetSupportedMemoryClocks(void *handle, unsigned *count, unsigned *clocks) {
    FIND(handle);
    return listed(gpu->memory, gpu->memory_count, count, clocks);
}

int nvmlDeviceGetSupportedGraphicsClocks(void *handle, unsigned memory, unsigned *count, unsigned *clocks) {
    FIND(handle);
    for (uint32_t at = 0; at < gpu->memory_count; at++)
        if (gpu->memory[at] == memory) return listed(gpu->graphics, gpu->graphics_count, count, clocks);
    return NOT_FOUND;
}

int nvmlDeviceGetClockInfo(void *handle, unsigned type, unsigned *clock) {
    FIND(handle);
    if (type == MEMORY) *clock = gpu->memory_locked_max ? gpu->memory_locked_max : gpu->memory[0];
    else if (now() < gpu->busy_until) *clock = running_mhz(gpu, NULL);
    else *clock = gpu->locked_min > gpu->idle_mhz ? gpu->locked_min : gpu->idle_mhz;
    return OK;
}

int nvmlDeviceGetMaxClockInfo(void *handle, unsigned type, unsigned *clock) {
    FIND(handle);
    *clock = type == MEMORY ? gpu->memory[0] : gpu->graphics[0];
    return OK;
}

int nvmlDeviceGetApplicationsClock(void *handle, unsigned type, unsigned *clock) {
    FIND(handle);
    *clock = type == MEMORY ? gpu->memory[0] : gpu->application_mhz;
    return OK;
}

static int may_set(const struct gpu *gpu) {
    if (gpu->mig) return NOT_SUPPORTED;
    if (gpu->may_set == ANYBODY || (gpu->may_set == ROOT && getenv("NVML_STANDIN_ROOT") != NULL)) return OK;
    return NO_PERMISSION;
}

static int set_range(struct gpu *gpu, unsigned low, unsigned high, uint32_t *min, uint32_t *max, uint32_t most, uint32_t least) {
    int code = may_set(gpu);
    if (code != OK) return code;
    if (low > high || high > most || low < least) return INVALID;
    struct timespec pause = {gpu->switch_ms / 1000, gpu->switch_ms % 1000 * 1000000L};
    nanosleep(&pause, NULL);
    enter();
    accrue(gpu, now());
    *min = low, *max = high, gpu->sets++;
    leave();
    return OK;
}

static int reset_range(struct gpu *gpu, uint32_t *min, uint32_t *max) {
    int code = may_set(gpu);
    if (code != OK) return code;
    enter();
    accrue(gpu, now());
    *min = *max = 0, gpu->resets++;
    leave();
    return OK;
}

int nvmlDeviceSetGpuLockedClocks(void *handle, unsigned low, unsigned high) {
    FIND(handle);
    return set_range(gpu, low, high, &gpu->locked_min, &gpu->locked_max, gpu->graphics[0], gpu->graphics[gpu->graphics_count - 1]);
}

int nvmlDeviceResetGpuLockedClocks(void *handle) { FIND(handle); return reset_range(gpu, &gpu->locked_min, &gpu->locked_max); }

int nvmlDeviceSetMemoryLockedClocks(void *handle, unsigned low, unsigned high) {
    FIND(handle);
    return set_range(gpu, low, high, &gpu->memory_locked_min, &gpu->memory_locked_max, gpu->memory[0], gpu->memory[gpu->memory_count - 1]);
}

int nvmlDeviceResetMemoryLockedClocks(void *handle) {
    FIND(handle);
    return reset_range(gpu, &gpu->memory_locked_min, &gpu->memory_locked_max);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts) {
    FIND(handle);
    if (gpu->power_reads == READS_NOTHING) return NOT_SUPPORTED;
    double watts = now() < gpu->busy_until ? busy_w(gpu, running_mhz(gpu, NULL)) : gpu->idle_w;
    if (gpu->power_reads == READS_NEGATIVE) watts = -watts;
    if (gpu->power_reads == READS_FROZEN) watts = gpu->frozen_w;
    *milliwatts = (unsigned)(int)(1000 * watts);
    return OK;
}

#ifndef WITHOUT_ENERGY
int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *millijoules) {
    FIND(handle);
    if (gpu->energy_reads == READS_NOTHING) return NOT_SUPPORTED;
    enter();
    accrue(gpu, now());
    double joules = gpu->energy_j;
    leave();
    unsigned long long whole = (unsigned long long)(1000 * joules);
    *millijoules = gpu->counter_bits && gpu->counter_bits < 64 ? whole & ((1ULL << gpu->counter_bits) - 1) : whole;
    return OK;
}
#endif

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts) {
    FIND(handle);
    if (!gpu->power_limit_mw) return NOT_SUPPORTED;
    *milliwatts = gpu->power_limit_mw;
    return OK;
}

int nvmlDeviceGetCurrentClocksEventReasons(void *handle, unsigned long long *reasons) {
    FIND(handle);
    running_mhz(gpu, reasons);
    if (now() >= gpu->busy_until) *reasons = gpu->locked_min > gpu->idle_mhz ? *reasons : REASON_IDLE;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *reasons) {
    return nvmlDeviceGetCurrentClocksEventReasons(handle, reasons);
}

struct process { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; };

int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, struct process *to) {
    FIND(handle);
    unsigned there = gpu->process_count;
    if (to == NULL || *count < there) { *count = there; return there ? SMALL : OK; }
    for (unsigned at = 0; at < there; at++) to[at] = (struct process){gpu->processes[at], 1 << 20, ~0u, ~0u};
    *count = there;
    return OK;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) { FIND(handle); *current = *pending = gpu->mig; return OK; }

int nvmlDeviceGetTotalEccErrors(void *handle, unsigned kind, unsigned since, unsigned long long *count) {
    FIND(handle);
    if (gpu->no_ecc || since != 0) return NOT_SUPPORTED;
    *count = kind ? gpu->ecc_uncorrected : gpu->ecc_corrected;
    return OK;
}

int nvmlDeviceGetRetiredPages(void *handle, unsigned cause, unsigned *count, unsigned long long *pages) {
    FIND(handle);
    if (gpu->no_ecc || cause > 1) return NOT_SUPPORTED;
    unsigned there = gpu->retired[cause];
    if (pages == NULL || *count < there) { *count = there; return there ? SMALL : OK; }
    for (unsigned at = 0; at < there; at++) pages[at] = at << 16;
    *count = there;
    return OK;
}

int nvmlDeviceGetRemappedRows(void *handle, unsigned *corrected, unsigned *uncorrected, unsigned *pending, unsigned *failed) {
    FIND(handle);
    if (gpu->no_ecc) return NOT_SUPPORTED;
    *corrected = 0, *uncorrected = gpu->remapped, *pending = *failed = 0;
    return OK;
}

/* A set of events: for each GPU, one more than the number of its events that were taken; 0 if it does not belong to the set. */
struct events { uint32_t next[GPUS]; };
struct event { void *device; unsigned long long type, data; unsigned gpu_instance, compute_instance; };

int nvmlEventSetCreate(struct events **set) { return (*set = calloc(1, sizeof **set)) ? OK : NO_PERMISSION; }

int nvmlEventSetFree(struct events *set) { free(set); return OK; }

int nvmlDeviceRegisterEvents(void *handle, unsigned long long types, struct events *set) {
    FIND(handle);
    if (gpu->no_xids || types != 8) return NOT_SUPPORTED;
    set->next[gpu - state->gpus] = gpu->xid_count + 1;
    return OK;
}

int nvmlEventSetWait_v2(struct events *set, struct event *event, unsigned timeout_ms) {
    int code = attached();
    if (code != OK) return code;
    (void)timeout_ms;
    for (unsigned at = 0; at < state->count; at++) {
        struct gpu *gpu = &state->gpus[at];
        if (!set->next[at] || set->next[at] > gpu->xid_count) continue;
        *event = (struct event){(void *)(uintptr_t)(at + 1), 8, gpu->xids[(set->next[at]++ - 1) % XIDS], ~0u, ~0u};
        return OK;
    }
    return TIMEOUT;
}

/* Begins work that takes `seconds` at the highest clock, of which the share `beta` depends on the clock (a GPU with a sweep has that of the
   sweep). Returns the monotonic time at which it ends, or -1 if there is no such GPU. */
double standin_begin(const char *uuid, double seconds, double beta) {
    if (attached() != OK) return -1;
    for (unsigned index = 0; index < state->count; index++) {
        struct gpu *gpu = &state->gpus[index];
        if (strcmp(gpu->uuid, uuid) != 0) continue;
        enter();
        double at = now(), start = gpu->busy_until > at ? gpu->busy_until : at;
        accrue(gpu, at);
        uint32_t mhz = running_mhz(gpu, NULL);
        double stretch = gpu->sweep_mhz[0] > 0 ? swept(gpu, gpu->sweep_stretch, mhz) : beta * gpu->graphics[0] / mhz + 1 - beta;
        gpu->busy_until = start + seconds * stretch * (gpu->slower > 0 ? gpu->slower : 1);
        gpu->works++;
        double end = gpu->busy_until;
        leave();
        return end;
    }
    return -1;
}

/* Sleeps until that time. */
void standin_wait(double end) {
    struct timespec at = {(time_t)end, (long)(1e9 * (end - (time_t)end))};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL) == EINTR) {}
}
