/*-------------------------------------------------------------------------
 *
 * batch.h
 *	  The worker's side of the counters.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_BATCH_H
#define STATBUFFER_BATCH_H

#include "counters.h"

/* What becomes of a key when the transaction of its batch is rolled back. */
typedef enum BatchVerdict
{
	VERDICT_AGAIN,				/* it is due again, before all others */
	VERDICT_SUSPECT,			/* the same, and it may be to blame */
	VERDICT_BACK_OFF,			/* it failed: due again at retry_at */
	VERDICT_DISCARD				/* it failed: its count is given up */
} BatchVerdict;

/* One key of a batch. */
typedef struct BatchItem
{
	SharedCounter *counter;
	dsa_pointer self;
	int64		count;
	ClockTime	counted_at;
	ClockTime	taken_at;
	BatchVerdict verdict;
	ClockTime	retry_at;
} BatchItem;

/*
 * What a worker has taken and not yet settled.  The items stay readable until
 * the next take; `nitems' tells how many of them are in flight.
 */
typedef struct CounterBatch
{
	SharedBuffer *buffer;
	BatchItem  *items;
	int			nitems;
	int64		discarded;		/* sum of the counts given up */
	int			nforeign;		/* keys of another shape that were due */
} CounterBatch;

extern void batch_serve_requests(SharedBuffer *buffer, ClockTime now);
extern int	batch_take(CounterBatch *batch, const CounterTable *table,
					   int limit, int suspect_limit, bool mix_failing,
					   ClockTime now, ClockTime foreign_retry_at);
extern void batch_pass_over(CounterBatch *batch, int i);
extern void batch_settle(CounterBatch *batch);
extern void batch_give_back(CounterBatch *batch);
extern void batch_tidy(CounterBatch *batch, int nitems,
					   const char *message);

#endif							/* STATBUFFER_BATCH_H */
