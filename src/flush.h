/*-------------------------------------------------------------------------
 *
 * flush.h
 *	  One flush.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_FLUSH_H
#define STATBUFFER_FLUSH_H

#include "batch.h"
#include "buffer.h"
#include "sink.h"

/* A key that is handed over, with the items of the batch that were merged. */
typedef struct FlushKey
{
	SinkKey		key;
	int			first_item;		/* in FlushState.items */
	int			nitems;
} FlushKey;

/* What a worker process flushes, and where that stands. */
typedef struct FlushState
{
	Oid			relid;
	SharedBuffer *shared;		/* NULL: it is not ours any more */
	SbBuffer   *buffer;			/* NULL: the definition was not read yet */
	bool		leaving;		/* the worker's main loop ends */
	ClockTime	paused_until;	/* the buffer fails, or is in others' way */

	/* for one transaction */
	MemoryContext context;		/* reset before each */
	CounterBatch batch;
	SinkKey    *sink_keys;		/* the keys as they are handed over */
	FlushKey   *keys;			/* the same, with their items */
	int			nkeys;
	int		   *items;			/* numbers of items of the batch */
	int			current_key;	/* the first one that the sink is storing; -1:
								 * none */
	int			current_nkeys;	/* how many it stores at once */
	bool		preparing;		/* the sink has not got anything yet */

	/* from transaction to transaction */
	int			conflicts;		/* deadlocks and the like, in a row */
	int			cancels;		/* in a row */

	/* the log of what was discarded */
	ClockTime	discarded_logged_at;	/* 0: never */
	uint64		discarded;		/* sum since then */
	bool		any_discarded;
} FlushState;

extern void flush_begin(FlushState *flush, SharedBuffer *shared);
extern void flush_set_connected(FlushState *flush);
extern void flush_end(FlushState *flush);
extern void flush_check_definition(FlushState *flush);
extern void flush_batch(FlushState *flush, ClockTime now);
extern void flush_log_discarded(FlushState *flush, bool at_once);

#endif							/* STATBUFFER_FLUSH_H */
