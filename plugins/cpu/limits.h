/* The rates that bound a call, of one thread; 0 where this processor has no such instruction. */
#ifndef FPQ_LIMITS_H
#define FPQ_LIMITS_H

double byte_products_per_second(double seconds);
double float_products_per_second(double seconds);

#endif
