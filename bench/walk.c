/*-------------------------------------------------------------------------
 *
 * walk.c
 *	  How long it takes to visit so many counters in random order.
 *
 * usage: walk COUNTERS
 *
 * Prints seconds.  Each visit needs the one before it, as in a chain, and
 * reads and writes a counter.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

/* as large as the counter of a text key of 16 bytes */
typedef struct Counter
{
	uint64_t	next;
	uint64_t	count;
	char		rest[64];
} Counter;

int
main(int argc, char **argv)
{
	uint64_t	n = argc > 1 ? strtoull(argv[1], NULL, 10) : 0;
	Counter    *counters = calloc(n, sizeof(Counter));
	uint64_t	random = 1;
	struct timespec began,
				ended;

	if (n == 0 || counters == NULL)
		return 1;

	/* one cycle through all of them */
	for (uint64_t i = 0; i < n; i++)
		counters[i].next = i;
	for (uint64_t i = n - 1; i > 0; i--)
	{
		uint64_t	j,
					next;

		random = random * 6364136223846793005U + 1442695040888963407U;
		j = (random >> 20) % i;
		next = counters[i].next;
		counters[i].next = counters[j].next;
		counters[j].next = next;
	}

	clock_gettime(CLOCK_MONOTONIC, &began);
	for (uint64_t i = 0, at = 0; i < n; i++)
	{
		counters[at].count++;
		at = counters[at].next;
	}
	clock_gettime(CLOCK_MONOTONIC, &ended);
	printf("%.6f\n", (double) (ended.tv_sec - began.tv_sec) +
		   (double) (ended.tv_nsec - began.tv_nsec) / 1e9);
	return counters[0].count == 1 ? 0 : 1;
}
