/*-------------------------------------------------------------------------
 *
 * standby.h
 *	  What the ledger has of a durable buffer, on a standby.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_STANDBY_H
#define STATBUFFER_STANDBY_H

#include "access/xlog.h"
#include "buffer.h"

typedef struct StandbyCounts StandbyCounts;

typedef void (*StandbyVisitor) (const KeyBytes *key, int64 count, void *arg);

extern StandbyCounts *standby_read(SbBuffer *buffer, Snapshot *snapshot);
extern void standby_visit(StandbyCounts *counts, StandbyVisitor visit,
						  void *arg);
extern bool standby_look_up(StandbyCounts *counts, const KeyBytes *key,
							int64 *count);

/*
 * Are the buffer's counts to be read from the ledger, because they are in the
 * memory of another server?
 */
static inline bool
standby_applies(const SbBuffer *buffer)
{
	return unlikely(buffer->options.durable) && RecoveryInProgress();
}

#endif							/* STATBUFFER_STANDBY_H */
