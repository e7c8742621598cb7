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

typedef struct PendingBuffer PendingBuffer;
typedef struct PendingKey PendingKey;

/* Called with the key, and what the transaction has added to it. */
typedef void (*PendingVisitor) (const KeyBytes *key, int64 delta, void *arg);

extern void pending_init(void);
extern SbBuffer *pending_open(Oid relid);
extern PendingKey *pending_add(SbBuffer *buffer, const BufferShape *shape,
							   const KeyBytes *key, int64 count, Oid userid);
extern const char *pending_key_data(const PendingKey *key);
extern void pending_add_again(PendingKey *key, int64 count, Oid userid);
extern void pending_add_now(SbBuffer *buffer, const BufferShape *shape,
							const KeyBytes *key, int64 count, Oid userid);
extern void pending_truncate(SbBuffer *buffer);
extern bool pending_truncated(SbBuffer *buffer);
extern bool pending_lookup(SbBuffer *buffer, const KeyBytes *key,
						   int64 *delta);
extern uint64 pending_begin_scan(void);
extern bool pending_scan_key(SbBuffer *buffer, const KeyBytes *key,
							 uint64 scan, int64 *delta);
extern void pending_scan_rest(SbBuffer *buffer, uint64 scan,
							  PendingVisitor visit, void *arg);

#endif							/* STATBUFFER_PENDING_H */
