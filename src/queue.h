/*-------------------------------------------------------------------------
 *
 * queue.h
 *	  The buffers that wait for a worker.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_QUEUE_H
#define STATBUFFER_QUEUE_H

#include "registry.h"

/* What a worker is to do that has nothing to do in its buffer. */
typedef enum QueueAdvice
{
	QUEUE_STAY,					/* nobody waits, as far as is known */
	QUEUE_TAKE,					/* serve the buffer that it was given */
	QUEUE_LEAVE					/* end: others need the slot */
} QueueAdvice;

extern void queue_set(const QueueEntry *entries, int nentries, int nwaiting,
					  bool loading);
extern QueueAdvice queue_ask(Oid owner, bool may_overtake, bool may_leave,
							 SharedBufferKey *key, bool *overtakes);

/*
 * Do other buffers wait for a worker?  Takes no lock: the launcher wakes the
 * workers when it has set the queue.
 */
static inline bool
queue_is_waited_for(void)
{
	return pg_atomic_read_u32(&shared_control->queue.waiting) > 0;
}

#endif							/* STATBUFFER_QUEUE_H */
