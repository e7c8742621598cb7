/*-------------------------------------------------------------------------
 *
 * pending_internal.h
 *	  What the current transaction has counted, for the rooms that keep it.
 *
 * For pending.c, which fills it, and publish.c, which publishes it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_PENDING_INTERNAL_H
#define STATBUFFER_PENDING_INTERNAL_H

#include "counters.h"
#include "pending.h"

/* What the transaction has to do with a buffer. */
struct PendingBuffer
{
	SbBuffer   *buffer;
	PendingBuffer *next;

	/* the level of the subtransaction that did it; 0: none */
	int			lock_level;		/* locked the relation */
	int			truncate_level; /* truncated it */
	int			flush_level;	/* asked for the flush of all keys */

	/* when publishing; the buffer may be read anew before the commit */
	SharedBuffer *shared;
	bool		attached;
	bool		dropped;		/* by the transaction itself */
	uint64		sum;			/* of the counts */
	uint64		nincrements;
	CounterPin *truncate_pins;
	int			ntruncate_pins;
	bool		has_requests;	/* there are PublishedKeys with one */
};

/*
 * What it has added to a key.
 *
 * A statement may go to and fro among a great many of these.  What an
 * increment touches, from `buffer' on, is in one cache line where allocate_key()
 * can do that and the key is short.
 */
struct PendingKey
{
	PendingKey *next;
	uint64		scan;			/* the last one that has it; see below */

	SbBuffer   *buffer;
	const BufferShape *shape;	/* the key was formed under */
	int64		delta;
	uint64		nincrements;
	uint32		hash;
	int			level;			/* of the subtransaction that changed it last */
	uint16		len;			/* as in KeyBytes */
	uint16		flush;			/* 1: it is to be flushed at once; not a bool,
								 * to keep `data' aligned for int */
	char		data[FLEXIBLE_ARRAY_MEMBER];
};

StaticAssertDecl(offsetof(PendingKey, data) % sizeof(int) == 0,
				 "keys must be aligned for int");

/* All of it.  Lives in TopTransactionContext. */
typedef struct PendingSet
{
	PendingBuffer *buffers;
	PendingKey *keys;
	uint64		nkeys;
	uint64		size;			/* of their stored forms */
	bool		flush_requested;	/* for some of it */
} PendingSet;

/* up to this many keys are searched linearly; beyond that we build a hash table */
#define LIST_SEARCH_MAX		8

extern void publish_prepare(PendingSet *set);
extern void publish_commit(PendingSet *set);
extern void publish_abort(PendingSet *set);
extern void publish_forget(void);

#endif							/* STATBUFFER_PENDING_INTERNAL_H */
