/*-------------------------------------------------------------------------
 *
 * drain.h
 *	  Waiting for a flush of everything that was published.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_DRAIN_H
#define STATBUFFER_DRAIN_H

#include "buffer.h"

/* The state of a drain, or its result. */
typedef enum DrainState
{
	DRAIN_WAITING,
	DRAIN_DONE,
	DRAIN_TIMED_OUT,
	DRAIN_STOPPED,				/* the buffer is stopped, so there is no
								 * worker */
	DRAIN_BLOCKED,				/* the worker cannot lock the relation */
	DRAIN_DEADLOCK				/* the worker waits for this transaction */
} DrainState;

extern DrainState drain_wait(SbBuffer *buffer, int64 timeout, bool stopping,
							 bool tell);
extern bool drain_is_locked_out_by_us(SbBuffer *buffer);

#endif							/* STATBUFFER_DRAIN_H */
