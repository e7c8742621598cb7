/*-------------------------------------------------------------------------
 *
 * pending.h
 *	  What the current transaction has counted.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_PENDING_H
#define STATBUFFER_PENDING_H

#include "buffer.h"
#include "counters.h"
#include "key.h"
#include "miscadmin.h"

typedef struct PendingBuffer PendingBuffer;
typedef struct PendingKey PendingKey;

/*
 * A buffer that a statement counts in, cached from call to call, with
 * everything that would otherwise have to be looked up again.
 */
typedef struct PendingTarget
{
	SbBuffer   *buffer;			/* open for counting, or NULL */
	Oid			userid;			/* whose privileges count */
	uint64		generation;		/* buffer_generation when it was opened */
	PendingKey *last;			/* the key last counted, or NULL; set by
								 * pending_add() */
} PendingTarget;

/* Is the target still open, for the current user? */
static inline bool
pending_is_open(const PendingTarget *target)
{
	return target->generation == buffer_generation &&
		target->buffer != NULL && target->userid == GetUserId();
}

/* Called with a key, and what the transaction has added to it. */
typedef void (*PendingVisitor) (const KeyBytes *key, int64 delta, void *arg);

extern void pending_init(void);
extern void pending_open(PendingTarget *target, Oid relid,
						 bool check_privilege);
extern bool pending_any(void);
extern void pending_come_first(bool committing);
extern int64 pending_add(PendingTarget *target, const BufferShape *shape,
						 const KeyBytes *key, int64 count);
extern int64 pending_add_text(PendingTarget *target, const char *text,
							  Size len, int64 count);
extern const char *pending_key_data(const PendingKey *key);
extern int64 pending_add_again(const PendingTarget *target, int64 count);
extern bool pending_add_now(const PendingTarget *target,
							const BufferShape *shape, const KeyBytes *key,
							int64 count);
extern void pending_truncate(SbBuffer *buffer);
extern bool pending_truncated(SbBuffer *buffer);
extern bool pending_request_flush(SbBuffer *buffer, const KeyBytes *key);
extern void pending_request_flush_all(SbBuffer *buffer);
extern bool pending_lookup(SbBuffer *buffer, const KeyBytes *key,
						   int64 *delta);
extern bool pending_sum(SbBuffer *buffer, uint64 *nkeys, int64 *sum);
extern void pending_begin_scan(SbBuffer *buffer);
extern bool pending_scan_key(SbBuffer *buffer, const KeyBytes *key,
							 int64 *delta);
extern void pending_scan_rest(SbBuffer *buffer, PendingVisitor visit,
							  void *arg);

#endif							/* STATBUFFER_PENDING_H */
