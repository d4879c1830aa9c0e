/* A stand-in for NVIDIA's management library: cards and their processes from the text file in $NVML_STANDIN.

   The file is read at every call, so that a test can change a card while workers look at it. Its lines:

       init CODE                nvmlInit fails with this result code, like 18: library and driver differ
       card UUID TOTAL_MIB HELD_MIB LOAD TEMPERATURE NAME WITH SPACES
       process PID MIB          a process on the card or slice above; MIB is - where the driver does not tell
       unlisted                 the driver lists no processes of the card above, as on WSL
       mode CODE                its compute mode: 0 default, 2 prohibited, 3 exclusive process
       lost                     it has fallen off the bus: every call about it fails
       mig                      it is in MIG mode, and these are its slices:
       slice UUID TOTAL_MIB HELD_MIB LOAD TEMPERATURE NAME WITH SPACES

   HELD_MIB is what the driver keeps for itself, and what it does not tell of processes. PIDs may be of another
   namespace. Only what loractl asks through nvidia-ml-py is here: names, structures and result codes are those of
   nvml.h.
*/
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB 1048576ULL
#define CARDS 16
#define PROCESSES 64
#define NOT_AVAILABLE UINT64_MAX

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15
};

typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;

typedef struct {
    char uuid[80], name[96];
    unsigned long long total, held;
    unsigned load, temperature, mode, processes;
    int lost, mig, unlisted, parent; /* parent: of a slice, else -1 */
    process_t process[PROCESSES];
} card_t;

static int started; /* how often it was initialised and not shut down */

static int begins(const char *line, const char *word)
{
    return strncmp(line, word, strlen(word)) == 0;
}

/* Adds a process or a property to the card above. */
static void add(card_t *card, const char *line)
{
    process_t *process = &card->process[card->processes];
    char size[32];
    if (sscanf(line, "mode %u", &card->mode) == 1)
        return;
    card->lost |= begins(line, "lost");
    card->mig |= begins(line, "mig");
    card->unlisted |= begins(line, "unlisted");
    if (card->processes < PROCESSES && sscanf(line, "process %u %31s", &process->pid, size) == 2) {
        process->memory = strcmp(size, "-") ? strtoull(size, NULL, 10) * MIB : NOT_AVAILABLE;
        process->gpu_instance = process->compute_instance = UINT32_MAX;
        card->processes++;
    }
}

/* Fills `cards` and `refusal`, the result of nvmlInit; returns how many there are, or -1 without a file. */
static int look_for(card_t *cards, int *refusal)
{
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256], kind[8];
    int count = 0, parent = -1;
    if (!file)
        return -1;
    while (fgets(line, sizeof line, file)) {
        card_t *card = &cards[count < CARDS ? count : CARDS - 1];
        if (sscanf(line, "init %d", refusal) == 1)
            continue;
        memset(card, 0, sizeof *card);
        if (sscanf(line, "%7s %79s %llu %llu %u %u %95[^\n]", kind, card->uuid, &card->total, &card->held, &card->load,
                   &card->temperature, card->name) == 7 && (!strcmp(kind, "card") || !strcmp(kind, "slice"))) {
            card->parent = !strcmp(kind, "slice") ? parent : -1;
            if (card->parent < 0)
                parent = count;
            if (count < CARDS - 1)
                count++;
        } else if (count) {
            add(&cards[count - 1], line);
        }
    }
    fclose(file);
    return count;
}

static int look(card_t *cards)
{
    int refusal;
    return look_for(cards, &refusal);
}

/* The card or slice of a handle, which is its place in the file + 1. */
static int find(void *handle, card_t *found)
{
    static __thread card_t cards[CARDS];
    intptr_t place = (intptr_t)handle - 1;
    if (!started)
        return UNINITIALIZED;
    if (place < 0 || place >= look(cards))
        return INVALID_ARGUMENT;
    *found = cards[place];
    if (found->parent >= 0)
        found->lost |= cards[found->parent].lost;
    return found->lost ? GPU_IS_LOST : SUCCESS;
}

/* The place of the n-th card (parent -1), or of the n-th slice of a card; -1 where there is none. */
static int place_of(int parent, unsigned n)
{
    static __thread card_t cards[CARDS];
    int count = look(cards), place;
    for (place = 0; place < count; place++)
        if (cards[place].parent == parent && n-- == 0)
            return place;
    return -1;
}

static int copy(char *buffer, unsigned length, const char *text)
{
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(buffer, text);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
    static __thread card_t cards[CARDS];
    int refusal = SUCCESS;
    (void)flags;
    if (look_for(cards, &refusal) < 0)
        return DRIVER_NOT_LOADED;
    if (refusal == SUCCESS)
        started++;
    return refusal;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }

int nvmlShutdown(void)
{
    if (!started)
        return UNINITIALIZED;
    started--;
    return SUCCESS;
}

const char *nvmlErrorString(int result)
{
    return result == SUCCESS ? "Success" : "an error of the stand-in";
}

int nvmlSystemGetDriverVersion(char *buffer, unsigned length) { return copy(buffer, length, "580.65.06"); }

int nvmlDeviceGetCount_v2(unsigned *count)
{
    if (!started)
        return UNINITIALIZED;
    for (*count = 0; place_of(-1, *count) >= 0; (*count)++)
        ;
    return SUCCESS;
}

static int give(int place, void **handle)
{
    card_t card;
    *handle = (void *)((intptr_t)place + 1);
    return find(*handle, &card);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) { return give(place_of(-1, index), handle); }

/* As nvml.h warns: NVML starts cards on its way to the one that is looked for, and says when one of them is lost. */
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    static __thread card_t cards[CARDS];
    int count = look(cards), place;
    for (place = 0; place < count; place++) {
        int result = give(place, handle);
        if (result || strcmp(cards[place].uuid, uuid) == 0)
            return result;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending)
{
    card_t card;
    int result = find(handle, &card);
    *current = *pending = (unsigned)card.mig;
    return result;
}

int nvmlDeviceGetMaxMigDeviceCount(void *handle, unsigned *count)
{
    card_t card;
    *count = 7;
    return find(handle, &card);
}

int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned index, void **slice)
{
    int place = place_of((int)((intptr_t)handle - 1), index);
    return place < 0 ? NOT_FOUND : give(place, slice);
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *slice, void **handle)
{
    card_t card;
    int result = find(slice, &card);
    return result ? result : card.parent < 0 ? INVALID_ARGUMENT : give(card.parent, handle);
}

int nvmlDeviceGetComputeMode(void *handle, unsigned *mode)
{
    card_t card;
    int result = find(handle, &card);
    *mode = card.mode;
    return result ? result : card.parent < 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetUUID(void *handle, char *buffer, unsigned length)
{
    card_t card;
    int result = find(handle, &card);
    return result ? result : copy(buffer, length, card.uuid);
}

int nvmlDeviceGetName(void *handle, char *buffer, unsigned length)
{
    card_t card;
    int result = find(handle, &card);
    return result ? result : copy(buffer, length, card.name);
}

int nvmlDeviceGetMemoryInfo(void *handle, memory_t *memory)
{
    card_t card;
    unsigned n;
    int result = find(handle, &card);
    if (result)
        return result;
    memory->total = card.total * MIB;
    memory->used = card.held * MIB;
    for (n = 0; n < card.processes; n++)
        if (card.process[n].memory != NOT_AVAILABLE)
            memory->used += card.process[n].memory;
    if (memory->used > memory->total)
        memory->used = memory->total;
    memory->free = memory->total - memory->used;
    return SUCCESS;
}

int nvmlDeviceGetUtilizationRates(void *handle, utilization_t *rates)
{
    card_t card;
    int result = find(handle, &card);
    rates->gpu = card.load;
    rates->memory = 0;
    return result ? result : card.parent < 0 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees)
{
    card_t card;
    int result = find(handle, &card);
    *degrees = card.temperature;
    if (result || sensor)
        return result ? result : INVALID_ARGUMENT;
    return card.parent < 0 ? SUCCESS : NOT_SUPPORTED;
}

#ifndef OLD
/* As the driver does it: with too little room it says how many there are. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *processes)
{
    card_t card;
    unsigned room = *count;
    int result = find(handle, &card);
    if (result || card.unlisted)
        return result ? result : NOT_SUPPORTED;
    *count = card.processes;
    if (room < card.processes)
        return INSUFFICIENT_SIZE;
    if (card.processes)
        memcpy(processes, card.process, card.processes * sizeof *processes);
    return SUCCESS;
}
#endif
