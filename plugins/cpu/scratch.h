/* Memory of one task, kept for the next: blocks that come from the system each time cost page faults. */
#ifndef FPQ_SCRATCH_H
#define FPQ_SCRATCH_H

#include <stdint.h>

/* At least `bytes` bytes, aligned to 64, of no particular content; NULL where memory has run out. */
void *take_scratch(int64_t bytes);
void give_scratch(void *scratch);

#endif
