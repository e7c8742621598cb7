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
#include "convert.h"
#include "lib/stringinfo.h"
#include "sink.h"

/*
 * A key that is delivered to the sink, with the items of the batch that were
 * merged into it.
 */
typedef struct FlushKey
{
	SinkKey		key;
	int			first_item;		/* in FlushState.items */
	int			nitems;
} FlushKey;

/* The state of a worker's flushes. */
typedef struct FlushState
{
	Oid			relid;
	SharedBuffer *shared;		/* NULL if it is no longer ours */
	SbBuffer   *buffer;			/* NULL if the definition was never read */
	bool		unread;			/* the definition must be read, but not before
								 * paused_until */
	bool		leaving;		/* the worker's main loop must end */
	bool		is_used;		/* the session has served a buffer */
	ClockTime	paused_until;	/* the buffer fails, or blocks others */

	/* reset for each transaction */
	MemoryContext context;		/* reset before each */
	CounterBatch batch;
	SinkKey    *sink_keys;		/* the keys as the sink gets them */
	FlushKey   *keys;			/* the same, with their items */
	int			nkeys;
	int			ndelivered;		/* how many of them the sink has stored */
	int		   *items;			/* indexes in the batch */
	int			current_key;	/* first key that the sink is storing; -1:
								 * none */
	int			current_nkeys;	/* number of keys that it stores at once */
	int			nfailed;		/* keys of the transaction that failed,
								 * without those passed over; 0: the buffer
								 * itself failed */
	bool		preparing;		/* no key is to blame for an error */
	ClockTime	began;			/* when the sink began to store the first key */
	int64		usecs;			/* how long it took for all; 0: not at all */
	ConvertResult converted;	/* what has become of keys that could not be
								 * read */

	/* of a durable buffer */
	uint64		epochs[TABLE_SHAPES];	/* of the keys of the batch, by shape */
	StringInfoData discards;	/* DiscardedKey...: what was discarded, and
								 * the ledger still has */
} FlushState;

extern void flush_begin(FlushState *flush, SharedBuffer *shared);
extern void flush_set_connected(FlushState *flush);
extern void flush_end(FlushState *flush);
extern void flush_check_definition(FlushState *flush);
extern void flush_batch(FlushState *flush, ClockTime now);
extern void flush_log_discarded(FlushState *flush, bool at_once);

#endif							/* STATBUFFER_FLUSH_H */
