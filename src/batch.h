/*-------------------------------------------------------------------------
 *
 * batch.h
 *	  The worker's side of the shared counters.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_BATCH_H
#define STATBUFFER_BATCH_H

#include "registry.h"

/* What becomes of a key when the transaction of its batch is rolled back. */
typedef enum BatchOutcome
{
	BATCH_AGAIN,				/* it is due again, before all others */
	BATCH_SUSPECT,				/* likewise, and it may be to blame */
	BATCH_BACK_OFF,				/* it failed: due again at retry_at */
	BATCH_DISCARD				/* it failed: its count is discarded */
} BatchOutcome;

/* One key of a batch. */
typedef struct BatchItem
{
	CounterRef	ref;
	int64		count;			/* 0: removed by batch_pass_over() */
	ClockTime	counted_at;
	ClockTime	taken_at;
	BatchOutcome outcome;		/* if the transaction is rolled back */
	bool		later;			/* for batch_pass_over_later() */
	ClockTime	retry_at;
} BatchItem;

/*
 * The counts that a worker has taken, until its transaction ends.  The items
 * stay readable until the next take; `nitems' is the number of those in
 * flight.
 */
typedef struct CounterBatch
{
	SharedBuffer *buffer;
	BatchItem  *items;
	int			size;			/* room for items */
	int			nitems;
	int64		discarded;		/* sum of the counts that were discarded */
	int			nunreadable;	/* due keys of another shape */

	/* about the last take */
	int			ntaken;
	int			nkept;			/* of these, not passed over */
	bool		had_suspects;
	bool		had_failing;	/* there were keys that had failed before */

	/* how many suspects are taken together: see batch_take() */
	int			suspect_limit;
	bool		mix_failing;	/* take keys that failed before with others */
} CounterBatch;

extern void batch_begin(CounterBatch *batch, SharedBuffer *buffer);
extern void batch_set_size(CounterBatch *batch, int size);
extern int	batch_take(CounterBatch *batch, const CounterTable *table,
					   int max_keys, ClockTime now,
					   ClockTime unreadable_retry_at);
extern void batch_pass_over(CounterBatch *batch, int i);
extern void batch_pass_over_later(CounterBatch *batch);
extern void batch_prepare_commit(CounterBatch *batch);
extern void batch_commit(CounterBatch *batch);
extern void batch_restore(CounterBatch *batch);
extern void batch_tidy(CounterBatch *batch, int nitems,
					   const char *message);
extern void batch_fail_unreadable(SharedBuffer *buffer,
								  SharedCounter *counter,
								  const char *message);
extern void batch_reap(SharedBuffer *buffer, const CounterTable *table,
					   ClockTime idle_before);
extern void batch_remove_shapes(SharedBuffer *buffer, ClockTime now);

#endif							/* STATBUFFER_BATCH_H */
