/* The rates that bound a call, of one thread; 0 where this processor has no such instruction. */
#ifndef FPQ_LIMITS_H
#define FPQ_LIMITS_H

#include <stdint.h>

double seconds_now(void); /* of a clock that goes on */
double byte_products_per_second(double seconds);
double float_products_per_second(double seconds);
/* Of reading so many bytes of its own, again and again; 0 where there is no memory for them. */
double memory_bytes_per_second(double seconds, int64_t bytes);

#endif
