/*-------------------------------------------------------------------------
 *
 * requests.h
 *	  What other processes ask of a buffer's worker.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_REQUESTS_H
#define STATBUFFER_REQUESTS_H

#include "counter.h"
#include "schedule.h"
#include "shmem.h"

/*
 * SharedRequests.asked: requests that are carried out once, however often made
 */
#define REQUEST_RECHECK		0x01	/* the definition may have changed */
#define REQUEST_FLUSH_ALL	0x02	/* make all keys due */
#define REQUEST_FLUSH_EARLY	0x04	/* make keys due that do not fail, and
									 * free idle keys: memory runs short, or a
									 * count is large */
#define REQUEST_SORT_AGAIN	0x08	/* TRUNCATE has cleared counts that the
									 * wheel holds by their old times */
#define REQUEST_MOVED		0x10	/* counts were moved to other keys: the
									 * same, and a drain that waits for the
									 * former keys must wait for these */

/*
 * A request of sb_flush(): a counter, pinned until the worker has handled it.
 */
typedef struct SharedFlushRequest
{
	dsa_pointer next;
	dsa_pointer counter;
} SharedFlushRequest;

/*
 * The state of drains: see sb_drain().
 *
 * A session that waits has a ticket, the value of `asked' after adding 1 to
 * it, and waits until `done' is no less.  The worker works in rounds, one for
 * all tickets that exist when it begins:
 *
 *	  idle			round = done: no keys have COUNTER_DRAIN
 *		| asked > round
 *		v
 *	  begin			all scheduled keys are made due (due = asked), get
 *		|			COUNTER_DRAIN and are counted in `keys'; round = asked
 *		v
 *	  working		each key that is flushed, or found empty, loses the flag and
 *		|			is subtracted from `keys'
 *		| keys = 0
 *		v
 *	  finished		done = round, and all waiting sessions are woken
 *
 * If a ticket is drawn while a round is working, all keys are made due at once
 * (due < asked), but its own round begins when this one is finished.  So no
 * session waits for keys that were counted after its round began, unless counts
 * were moved meanwhile (REQUEST_MOVED): then all keys join the round.
 *
 * Invariants: done <= round <= due <= asked.  `keys' is the number of counters
 * that have COUNTER_DRAIN.  If the worker is interrupted, the next one
 * continues from these fields.
 */
typedef struct SharedDrain
{
	pg_atomic_uint64 asked;		/* the last ticket */
	pg_atomic_uint64 done;		/* the last one that is satisfied */
	pg_atomic_uint64 due;		/* (w) the last one that made keys due */
	pg_atomic_uint64 round;		/* (w) the last one that has a round */
	pg_atomic_uint64 keys;		/* (w) keys still to flush in this round */
} SharedDrain;

/*
 * Requests to the buffer's worker.  Fields without a mark are atomic, and set
 * by any process that keeps the buffer from being removed, by a lock on the
 * relation or on the buffer's partition of the registry.  Those marked (w) are
 * written only by the worker, or the process that acts as the worker; others
 * may read them to see whether there is anything to do.  A process that makes
 * a request wakes the worker, or the launcher, afterwards.
 */
typedef struct SharedRequests
{
	pg_atomic_uint32 asked;		/* mask of REQUEST_... */
	uint32		taken;			/* (w) requests that the worker has taken and
								 * not yet carried out */
	pg_atomic_uint64 early_at;	/* when requests_ask_early() last asked; 0:
								 * never */

	pg_atomic_uint64 flushes;	/* list of SharedFlushRequest */
	dsa_pointer flushes_taken;	/* (w) taken by the worker */

	SharedDrain drain;

	/* the worker waits for a lock on the relation, or at the gate (w) */
	pg_atomic_uint32 locked_out;

	/*
	 * The time when sb_stop() began to wait for the worker's transaction; 0
	 * if it does not wait.  While it is set, the worker cancels its
	 * transactions.  Written under ShareRowExclusiveLock on the relation.
	 */
	pg_atomic_uint64 halt_at;
} SharedRequests;

extern void requests_init(SharedRequests *requests);

/* for all processes */
extern void requests_ask(SharedRequests *requests, uint32 what);
extern bool requests_ask_early(SharedRequests *requests);
extern dsa_pointer requests_allocate_flush(void);
extern void requests_flush_key(SharedRequests *requests, dsa_pointer pointer,
							   CounterRef ref);
extern void requests_flush_published(SharedRequests *requests,
									 dsa_pointer pointer, CounterRef ref);
extern uint64 requests_ask_drain(SharedRequests *requests);
extern bool requests_are_open(SharedRequests *requests);

/* for the buffer's worker, or the process that removes or saves the buffer */
extern bool requests_are_new(SharedRequests *requests, uint32 what);
extern uint32 requests_take(SharedRequests *requests);
extern void requests_done(SharedRequests *requests, uint32 what);
extern void requests_serve(SharedRequests *requests, SharedSchedule *schedule,
						   ClockTime now);
extern void requests_drop_flushes(SharedRequests *requests);
extern void requests_set_locked_out(SharedRequests *requests, bool locked_out);

/*
 * (w) A key was flushed or found empty, so no request concerns it any more, and
 * drains need not wait for it.
 */
static inline void
requests_clear_key(SharedRequests *requests, SharedCounter *counter)
{
	uint32		flags = pg_atomic_read_u32(&counter->pins) &
	(COUNTER_DRAIN | COUNTER_REQUESTED);

	if (flags == 0)
		return;
	counter_clear_flag(counter, flags);
	if (flags & COUNTER_DRAIN)
	{
		Assert(pg_atomic_read_u64(&requests->drain.keys) > 0);
		pg_atomic_fetch_sub_u64(&requests->drain.keys, 1);
	}
}

/* Has a drain with this ticket been satisfied? */
static inline bool
requests_drain_is_done(SharedRequests *requests, uint64 ticket)
{
	return pg_atomic_read_u64(&requests->drain.done) >= ticket;
}

#endif							/* STATBUFFER_REQUESTS_H */
