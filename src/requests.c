/*-------------------------------------------------------------------------
 *
 * requests.c
 *	  What other processes ask of a buffer's worker.
 *
 * Most requests are bits of one mask.  The worker takes them all at once, and
 * clears each when it has carried it out.  The requests that it has taken are
 * in shared memory, too, so that the next worker carries out those that an
 * interrupted one has not.  Flushes of single keys are a list, and drains are
 * numbers: see SharedDrain.
 *
 * These functions only record requests; the caller wakes the worker.  How a
 * session waits for a drain is in drain.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "requests.h"

/* the least time between two requests of requests_ask_early() */
#define EARLY_MSECS		100

/* The requests of a new buffer.  Cannot fail. */
void
requests_init(SharedRequests *requests)
{
	pg_atomic_init_u32(&requests->asked, 0);
	pg_atomic_init_u64(&requests->early_at, 0);
	requests->taken = 0;
	pg_atomic_init_u64(&requests->flushes, InvalidDsaPointer);
	requests->flushes_taken = InvalidDsaPointer;
	pg_atomic_init_u64(&requests->drain.asked, 0);
	pg_atomic_init_u64(&requests->drain.done, 0);
	pg_atomic_init_u64(&requests->drain.due, 0);
	pg_atomic_init_u64(&requests->drain.round, 0);
	pg_atomic_init_u64(&requests->drain.keys, 0);
	pg_atomic_init_u32(&requests->locked_out, 0);
	pg_atomic_init_u64(&requests->halt_at, 0);
}

/* ------------------------------------------------------------------------
 * Asking
 * ------------------------------------------------------------------------
 */

/* Make the requests in the mask.  Takes no lock, cannot fail. */
void
requests_ask(SharedRequests *requests, uint32 what)
{
	pg_atomic_fetch_or_u32(&requests->asked, what);
}

/*
 * Request an early flush, unless one was requested within EARLY_MSECS: a worker
 * that cannot flush must not be woken with each key that is refused.  Returns
 * whether it was requested; then the caller wakes the worker.  Takes no lock,
 * cannot fail.
 */
bool
requests_ask_early(SharedRequests *requests)
{
	if (!clock_limit_shared(&requests->early_at, EARLY_MSECS))
		return false;
	requests_ask(requests, REQUEST_FLUSH_EARLY);
	return true;
}

/*
 * Is there any request that the worker must handle now?  For the launcher,
 * too; takes no lock.  A drain whose keys are still to be flushed is not
 * counted: these keys are in the schedule.
 */
bool
requests_are_open(SharedRequests *requests)
{
	SharedDrain *drain = &requests->drain;
	uint64		asked = pg_atomic_read_u64(&drain->asked);

	return pg_atomic_read_u32(&requests->asked) != 0 ||
		requests->taken != 0 ||
		DsaPointerIsValid(requests->flushes_taken) ||
		DsaPointerIsValid(pg_atomic_read_u64(&requests->flushes)) ||
		asked != pg_atomic_read_u64(&drain->due) ||
		(pg_atomic_read_u64(&drain->keys) == 0 &&
		 asked != pg_atomic_read_u64(&drain->done));
}

/*
 * Allocate a request for requests_flush_key() or requests_flush_published(), and
 * map it: later, when a counter is pinned or the transaction has committed,
 * nothing may fail.  Returns InvalidDsaPointer if memory is out.  May raise other
 * errors.
 */
dsa_pointer
requests_allocate_flush(void)
{
	dsa_pointer pointer;

	pointer = space_try_allocate(sizeof(SharedFlushRequest), 0);
	(void) space_address(pointer);
	return pointer;
}

/*
 * Push a request on the list.  There is no ABA problem, because the worker
 * takes the whole list at once.
 */
static void
push_flush(SharedRequests *requests, dsa_pointer pointer, CounterRef ref)
{
	SharedFlushRequest *request = space_address(pointer);
	uint64		head = pg_atomic_read_u64(&requests->flushes);

	request->counter = ref.self;
	do
	{
		request->next = head;
	} while (!pg_atomic_compare_exchange_u64(&requests->flushes, &head,
											 pointer));
}

/*
 * Request the flush of a key.  The caller has allocated the request and pinned
 * the counter; both belong to the request from here on.
 */
void
requests_flush_key(SharedRequests *requests, dsa_pointer pointer,
				   CounterRef ref)
{
	/*
	 * One request for a key is enough: the worker may be busy for a long
	 * time.
	 */
	if (pg_atomic_fetch_or_u32(&ref.counter->pins, COUNTER_ASKED) & COUNTER_ASKED)
	{
		counter_unpin(ref.counter);
		space_free(pointer);
	}
	else
		push_flush(requests, pointer, ref);
}

/*
 * Likewise, at the end of a transaction: takes no lock, cannot fail.  The
 * request is made even if there is another one for the key, because it could
 * not be freed here.
 */
void
requests_flush_published(SharedRequests *requests, dsa_pointer pointer,
						 CounterRef ref)
{
	counter_set_flag(ref.counter, COUNTER_ASKED);
	push_flush(requests, pointer, ref);
}

/* Request a drain; returns the ticket.  Takes no lock, cannot fail. */
uint64
requests_ask_drain(SharedRequests *requests)
{
	return pg_atomic_add_fetch_u64(&requests->drain.asked, 1);
}

/* ------------------------------------------------------------------------
 * What follows is for the buffer's worker.
 * ------------------------------------------------------------------------
 */

/* Have any of these requests been made since requests_take()? */
bool
requests_are_new(SharedRequests *requests, uint32 what)
{
	return (pg_atomic_read_u32(&requests->asked) & what) != 0;
}

/* Take the requests in the mask.  Returns all that are to be carried out. */
uint32
requests_take(SharedRequests *requests)
{
	/* avoid needless writes: usually there is no request */
	if (pg_atomic_read_u32(&requests->asked) != 0)
		requests->taken |= pg_atomic_exchange_u32(&requests->asked, 0);
	return requests->taken;
}

/* Note that requests were carried out. */
void
requests_done(SharedRequests *requests, uint32 what)
{
	requests->taken &= ~what;
}

/* Make the keys due that sb_flush() has asked for. */
static void
serve_flushes(SharedRequests *requests, SharedSchedule *schedule)
{
	for (;;)
	{
		while (DsaPointerIsValid(requests->flushes_taken))
		{
			dsa_pointer pointer = requests->flushes_taken;
			SharedFlushRequest *request = space_address(pointer);
			CounterRef	ref = counter_ref(request->counter);

			/* from here on the key can be requested again */
			if (pg_atomic_fetch_and_u32(&ref.counter->pins, ~COUNTER_ASKED) &
				COUNTER_LINKED)
				schedule_make_due(schedule, ref);
			requests->flushes_taken = request->next;
			counter_unpin(ref.counter);
			space_free(pointer);
		}
		if (!DsaPointerIsValid(pg_atomic_read_u64(&requests->flushes)))
			break;
		requests->flushes_taken = pg_atomic_exchange_u64(&requests->flushes,
														 InvalidDsaPointer);
	}
}

/* All keys of a round are flushed: wake the sessions that wait for it. */
static void
finish_round(SharedDrain *drain)
{
	uint64		round = pg_atomic_read_u64(&drain->round);

	if (pg_atomic_read_u64(&drain->done) == round)
		return;
	pg_atomic_write_u64(&drain->done, round);
	ConditionVariableBroadcast(&shared_control->drain_cv);
}

/*
 * Carry out the requests that concern the schedule: flushes of single keys and
 * of all, drains, and counts that were cleared.  May raise an error if a
 * segment cannot be mapped; the requests stay.
 */
void
requests_serve(SharedRequests *requests, SharedSchedule *schedule,
			   ClockTime now)
{
	SharedDrain *drain = &requests->drain;
	uint32		taken = requests->taken;
	uint64		asked;
	bool		round_is_over;
	bool		begin_round;

	serve_flushes(requests, schedule);
	if (taken & (REQUEST_SORT_AGAIN | REQUEST_MOVED))
	{
		schedule_sort_again(schedule, now);
		requests_done(requests, REQUEST_SORT_AGAIN);
	}

	/* before the round is found to be over: its keys may have become empty */
	if (taken & REQUEST_MOVED)
	{
		if (pg_atomic_read_u64(&drain->done) !=
			pg_atomic_read_u64(&drain->round))
		{
			schedule_make_all_due(schedule, true);
			pg_atomic_fetch_add_u64(&drain->keys,
									schedule_mark_due(schedule, COUNTER_DRAIN));
		}
		requests_done(requests, REQUEST_MOVED);
	}

	/* everything that the tickets are for was published before this */
	asked = pg_atomic_read_u64(&drain->asked);
	pg_memory_barrier();

	round_is_over = pg_atomic_read_u64(&drain->keys) == 0;
	begin_round = round_is_over && pg_atomic_read_u64(&drain->round) != asked;
	if ((taken & REQUEST_FLUSH_ALL) || begin_round ||
		pg_atomic_read_u64(&drain->due) != asked)
	{
		schedule_make_all_due(schedule, true);
		pg_atomic_write_u64(&drain->due, asked);
		requests_done(requests, REQUEST_FLUSH_ALL);
	}

	if (!round_is_over)
		return;
	finish_round(drain);
	if (begin_round)
	{
		pg_atomic_write_u64(&drain->keys,
							schedule_mark_due(schedule, COUNTER_DRAIN));
		pg_atomic_write_u64(&drain->round, asked);
		if (pg_atomic_read_u64(&drain->keys) == 0)
			finish_round(drain);
	}
}

/*
 * Drop the requests to flush single keys, and release their pins.  For the
 * process that removes the buffer, or saves its counts.
 */
void
requests_drop_flushes(SharedRequests *requests)
{
	dsa_pointer pointer;

	while (DsaPointerIsValid(pointer = requests->flushes_taken) ||
		   DsaPointerIsValid(pointer = pg_atomic_exchange_u64(&requests->flushes,
															  InvalidDsaPointer)))
	{
		SharedFlushRequest *request = space_address(pointer);
		SharedCounter *counter = counter_at(request->counter);

		requests->flushes_taken = request->next;
		counter_clear_flag(counter, COUNTER_ASKED);
		counter_unpin(counter);
		space_free(pointer);
	}
}

/*
 * Note whether the worker waits for a lock that another session has.  If so,
 * that session may itself be waiting for a drain, so wake the sessions that
 * do.
 */
void
requests_set_locked_out(SharedRequests *requests, bool locked_out)
{
	pg_atomic_write_u32(&requests->locked_out, locked_out ? 1 : 0);
	if (locked_out)
		ConditionVariableBroadcast(&shared_control->drain_cv);
}
