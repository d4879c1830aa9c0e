/* A stand-in for NVIDIA's management library: cards and their processes from the text file in $NVML_STANDIN.

   The file is read at every call, so that a test can change a card while workers look at it. Its lines:

       card UUID TOTAL_MIB HELD_MIB LOAD TEMPERATURE NAME WITH SPACES
       process PID MIB          a process on the card above; MIB is - where the driver does not tell

   HELD_MIB is what the driver keeps for itself. Only what nvidia-ml-py needs for the calls of worker/devices.py is here:
   names, structures and result codes are those of nvml.h.
*/
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB 1048576ULL
#define CARDS 16
#define PROCESSES 64
#define NOT_AVAILABLE UINT64_MAX

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9 };

typedef struct { unsigned pid; unsigned long long memory; unsigned gpu_instance, compute_instance; } process_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;

typedef struct {
    char uuid[80], name[96];
    unsigned long long total, held;
    unsigned load, temperature, processes;
    process_t process[PROCESSES];
} card_t;

/* Fills `cards`; returns how many there are, or -1 without a file. */
static int look(card_t *cards)
{
    const char *path = getenv("NVML_STANDIN");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256], size[32];
    int count = 0;
    if (!file)
        return -1;
    while (fgets(line, sizeof line, file)) {
        card_t *card = &cards[count < CARDS ? count : CARDS - 1];
        process_t *process;
        memset(card, 0, sizeof *card);
        if (sscanf(line, "card %79s %llu %llu %u %u %95[^\n]", card->uuid, &card->total, &card->held, &card->load,
                   &card->temperature, card->name) == 6) {
            if (count < CARDS - 1)
                count++;
            continue;
        }
        if (count == 0 || cards[count - 1].processes == PROCESSES)
            continue;
        card = &cards[count - 1];
        process = &card->process[card->processes];
        if (sscanf(line, "process %u %31s", &process->pid, size) == 2) {
            process->memory = strcmp(size, "-") ? strtoull(size, NULL, 10) * MIB : NOT_AVAILABLE;
            process->gpu_instance = process->compute_instance = UINT32_MAX;
            card->processes++;
        }
    }
    fclose(file);
    return count;
}

/* The card of a handle, which is its index + 1. */
static int find(void *handle, card_t *found)
{
    static __thread card_t cards[CARDS];
    intptr_t index = (intptr_t)handle - 1;
    if (index < 0 || index >= look(cards))
        return INVALID_ARGUMENT;
    *found = cards[index];
    return SUCCESS;
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
    (void)flags;
    return look(cards) < 0 ? DRIVER_NOT_LOADED : SUCCESS;
}

int nvmlInit_v2(void) { return nvmlInitWithFlags(0); }
int nvmlShutdown(void) { return SUCCESS; }

const char *nvmlErrorString(int result)
{
    return result == SUCCESS ? "Success" : "an error of the stand-in";
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    static __thread card_t cards[CARDS];
    int found = look(cards);
    *count = found < 0 ? 0 : (unsigned)found;
    return found < 0 ? DRIVER_NOT_LOADED : SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    card_t card;
    *handle = (void *)((intptr_t)index + 1);
    return find(*handle, &card);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    static __thread card_t cards[CARDS];
    int count = look(cards), index;
    for (index = 0; index < count; index++)
        if (strcmp(cards[index].uuid, uuid) == 0) {
            *handle = (void *)((intptr_t)index + 1);
            return SUCCESS;
        }
    return NOT_FOUND;
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
    return result;
}

int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *degrees)
{
    card_t card;
    int result = find(handle, &card);
    *degrees = card.temperature;
    return sensor == 0 ? result : INVALID_ARGUMENT;
}

/* As the driver does it: with too little room it says how many there are. */
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, process_t *processes)
{
    card_t card;
    unsigned room = *count;
    int result = find(handle, &card);
    if (result)
        return result;
    *count = card.processes;
    if (room < card.processes)
        return INSUFFICIENT_SIZE;
    if (card.processes)
        memcpy(processes, card.process, card.processes * sizeof *processes);
    return SUCCESS;
}
