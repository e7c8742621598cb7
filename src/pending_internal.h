/*-------------------------------------------------------------------------
 *
 * pending_internal.h
 *	  What the current transaction has counted: private declarations.
 *
 * Shared by pending.c, which fills it in, and publish.c, which publishes it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_PENDING_INTERNAL_H
#define STATBUFFER_PENDING_INTERNAL_H

#ifndef WIN32
#include <sys/mman.h>
#endif

#include "counters.h"
#include "ledger.h"
#include "pending.h"
#include "utils/memutils.h"

/* What the transaction has done to a buffer. */
struct PendingBuffer
{
	SbBuffer   *buffer;
	PendingBuffer *next;

	/* all false if the subtransactions that did it were rolled back */
	bool		locked;			/* the relation */
	bool		truncated;
	bool		flush_all;		/* requested a flush of all keys */

	/* has warned that an increment outside the transaction was discarded */
	bool		warned;

	/* used for publishing; the definition may be reread before the commit */
	SharedBuffer *shared;
	bool		attached;
	bool		dropped;		/* by the transaction itself */
	uint64		sum;			/* of the counts */
	uint64		nincrements;
	uint64		discarded;		/* sum of the counts that found no room */
	uint64		ndiscarded;		/* and of how many keys */
	TableResult full;			/* why, of the last one */
	CounterPin *truncate_pins;
	int			ntruncate_pins;
	bool		has_requests;	/* some PublishedKey has a request */
	LedgerBody *body;			/* what is appended to the ledger, or NULL */
};

#define PENDING_UNDO_BITS	46
#define PENDING_HUGE_PAGE	((Size) 2 * 1024 * 1024)

/*
 * What the transaction has added to a key.
 *
 * A statement may alternate between a great many keys.  allocate_key() aligns
 * them to cache lines, and a key that takes 20 bytes has only one.
 */
struct PendingKey
{
	PendingKey *next;
	const BufferShape *shape;	/* under which the key was formed */
	int64		delta;
	uint64		nincrements;
	uint64		undo:PENDING_UNDO_BITS, /* serial of its last undo record; see
										 * pending.c */
				flush:1,		/* flush at once */
				scanned:1,		/* by the present scan */
				len:16;			/* as in KeyBytes */
	uint32		hash;
	char		data[FLEXIBLE_ARRAY_MEMBER];
};

StaticAssertDecl(offsetof(PendingKey, data) % sizeof(int) == 0,
				 "keys must be aligned for int");

/* Get the buffer in which a key was counted. */
static inline SbBuffer *
pending_key_buffer(const PendingKey *key)
{
	return key->shape->buffer;
}

/*
 * Everything that the transaction has counted.  The lists live in
 * TopTransactionContext.
 */
typedef struct PendingSet
{
	PendingBuffer *buffers;
	PendingKey *keys;
	uint64		nkeys;
	uint64		size;			/* bytes of the keys' stored forms */
	bool		flush_requested;	/* a flush of some keys was requested */
} PendingSet;

/* up to this many keys are searched linearly; beyond that we build a hash table */
#define LIST_SEARCH_MAX		8

/*
 * Allocate memory for a great many keys, to the end of the transaction.
 *
 * They are visited in no order.  So ask for huge pages: with others, most
 * visits miss the TLB, and each 4 kB begins with a page fault.
 */
static inline void *
pending_allocate_many(Size size)
{
	void	   *space = MemoryContextAllocHuge(TopTransactionContext, size);

#ifdef MADV_HUGEPAGE
	char	   *begin = (char *) TYPEALIGN(PENDING_HUGE_PAGE, space);
	char	   *end = (char *) TYPEALIGN_DOWN(PENDING_HUGE_PAGE,
											  (char *) space + size);

	/* if the system does not know them, or has none left, that is fine */
	if (begin < end)
		(void) madvise(begin, end - begin, MADV_HUGEPAGE);
#endif
	return space;
}

extern void publish_warn_full(SbBuffer *buffer, SharedBuffer *shared,
							  TableResult result, uint64 nkeys);
extern void publish_prepare(PendingSet *set);
extern void publish_commit(PendingSet *set);
extern void publish_abort(PendingSet *set);
extern void publish_append_prepared(PendingSet *set);
extern void publish_prepared(PendingSet *set);
extern void publish_forget(void);

#endif							/* STATBUFFER_PENDING_INTERNAL_H */
