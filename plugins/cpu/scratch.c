/* A list of blocks that no task uses: never more than tasks have run at once. Blocks up to two slots of rows of PackedGemm
 * (packed_gemm_op.c: 12 MiB and a little for 6144 channels) stay, since every layer takes one. Larger ones go back to the
 * system: their page faults are few beside the work on them, and the next layers need room. */
#include "scratch.h"

#include <stdatomic.h>
#include <stdlib.h>

enum { HEAD = 64, MOST_KEPT = 13 << 20 };

#if defined(_WIN32) /* its C library has no aligned_alloc */
#include <malloc.h>
static void *allocate(int64_t bytes) { return _aligned_malloc((size_t)bytes, HEAD); }
static void release(void *memory) { _aligned_free(memory); }
#else
static void *allocate(int64_t bytes) { return aligned_alloc(HEAD, (size_t)bytes); }
static void release(void *memory) { free(memory); }
#endif

typedef struct Block {
  struct Block *next;
  int64_t bytes; /* behind the head */
} Block;

static Block *unused;
static atomic_flag busy = ATOMIC_FLAG_INIT;

static void lock(void) {
  while (atomic_flag_test_and_set_explicit(&busy, memory_order_acquire)) {
  }
}

static void unlock(void) { atomic_flag_clear_explicit(&busy, memory_order_release); }

/* The first block on the list that is large enough, else any: its place is taken by a larger one. */
static Block *from_list(int64_t bytes) {
  lock();
  Block **place = &unused;
  while (*place && (*place)->bytes < bytes) place = &(*place)->next;
  if (!*place) place = &unused;
  Block *block = *place;
  if (block) *place = block->next;
  unlock();
  return block;
}

void *take_scratch(int64_t bytes) {
  Block *block = from_list(bytes);
  if (block && block->bytes < bytes) {
    release(block);
    block = NULL;
  }
  if (!block) {
    int64_t whole = (bytes + HEAD - 1) / HEAD * HEAD;
    block = allocate(HEAD + whole);
    if (!block) return NULL;
    block->bytes = whole;
  }
  return (char *)block + HEAD;
}

void give_scratch(void *scratch) {
  Block *block = (Block *)((char *)scratch - HEAD);
  if (block->bytes > MOST_KEPT) {
    release(block);
    return;
  }
  lock();
  block->next = unused, unused = block;
  unlock();
}
