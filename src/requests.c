/*-------------------------------------------------------------------------
 *
 * requests.c
 *	  What other processes ask of a buffer's worker.
 *
 * Most requests are bits of one mask.  The worker takes them all at once, and
 * forgets each when it has carried it out; what it has taken is in shared
 * memory, too, so that the next worker does what an interrupted one has not.
 * Flushes of single keys are a list, and drains are numbers: see SharedDrain.
 *
 * This room sets what is asked for; the caller wakes the worker.  How a session
 * waits for a drain is in drain.c.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "requests.h"

/* The requests of a new buffer.  Cannot fail. */
void
requests_init(SharedRequests *requests)
{
	pg_atomic_init_u32(&requests->asked, 0);
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

/* Ask for what is in the mask.  Takes no lock, cannot fail. */
void
requests_ask(SharedRequests *requests, uint32 what)
{
	pg_atomic_fetch_or_u32(&requests->asked, what);
}

/*
 * Is there anything to do that is not a matter of time?  For the launcher, too;
 * needs no lock.  A drain whose keys are still to be flushed is not: these are
 * in the schedule.
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
 * Allocate a request for requests_flush_key() or requests_flush_published();
 * InvalidDsaPointer when memory is out.  Raises an error if it cannot be mapped:
 * later, when a counter is pinned or the transaction has committed, nothing may
 * fail.
 */
dsa_pointer
requests_allocate_flush(void)
{
	dsa_pointer pointer;

	pointer = dsa_allocate_extended(shared_area, sizeof(SharedFlushRequest),
									DSA_ALLOC_NO_OOM);
	(void) dsa_get_address(shared_area, pointer);
	return pointer;
}

/* The worker takes the list whole, so that a head cannot come back. */
static void
push_flush(SharedRequests *requests, dsa_pointer pointer, CounterRef ref)
{
	SharedFlushRequest *request = dsa_get_address(shared_area, pointer);
	uint64		head = pg_atomic_read_u64(&requests->flushes);

	request->counter = ref.self;
	do
	{
		request->next = head;
	} while (!pg_atomic_compare_exchange_u64(&requests->flushes, &head,
											 pointer));
}

/*
 * Ask for the flush of a key.  The caller has allocated the request and pinned
 * the counter; both are the request's from here on.
 */
void
requests_flush_key(SharedRequests *requests, dsa_pointer pointer,
				   CounterRef ref)
{
	/* one request is enough for a key: the worker may be busy for long */
	if (pg_atomic_fetch_or_u32(&ref.counter->pins, COUNTER_ASKED) & COUNTER_ASKED)
	{
		counter_unpin(ref.counter);
		dsa_free(shared_area, pointer);
	}
	else
		push_flush(requests, pointer, ref);
}

/*
 * The same at the end of a transaction: takes no lock, cannot fail.  There may
 * be other requests for the key, because this one cannot be freed here.
 */
void
requests_flush_published(SharedRequests *requests, dsa_pointer pointer,
						 CounterRef ref)
{
	counter_set_flag(ref.counter, COUNTER_ASKED);
	push_flush(requests, pointer, ref);
}

/* Ask for a drain; returns the ticket. */
uint64
requests_ask_drain(SharedRequests *requests)
{
	return pg_atomic_add_fetch_u64(&requests->drain.asked, 1);
}

/* ------------------------------------------------------------------------
 * What follows is for the buffer's worker.
 * ------------------------------------------------------------------------
 */

/* Take what is asked for; returns all that is to be carried out. */
uint32
requests_take(SharedRequests *requests)
{
	/* read first: usually there is nothing, and others write there */
	if (pg_atomic_read_u32(&requests->asked) != 0)
		requests->taken |= pg_atomic_exchange_u32(&requests->asked, 0);
	return requests->taken;
}

/* What was taken is carried out. */
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
			SharedFlushRequest *request = dsa_get_address(shared_area, pointer);
			CounterRef	ref = counter_ref(request->counter);

			/* another request for the key is heard from here on */
			if (pg_atomic_fetch_and_u32(&ref.counter->pins, ~COUNTER_ASKED) &
				COUNTER_LINKED)
				schedule_make_due(schedule, ref);
			requests->flushes_taken = request->next;
			counter_unpin(ref.counter);
			dsa_free(shared_area, pointer);
		}
		if (!DsaPointerIsValid(pg_atomic_read_u64(&requests->flushes)))
			break;
		requests->flushes_taken = pg_atomic_exchange_u64(&requests->flushes,
														 InvalidDsaPointer);
	}
}

/* All keys of a round are flushed: wake everybody who waits for it. */
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
 * Bring the schedule to what was taken: flushes of keys and of all, drains, and
 * counts that were cleared.
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
	if (taken & REQUEST_SORT_AGAIN)
	{
		schedule_sort_again(schedule, now);
		requests_done(requests, REQUEST_SORT_AGAIN);
	}

	/* everything that the ticket is for was published before */
	asked = pg_atomic_read_u64(&drain->asked);
	pg_memory_barrier();

	round_is_over = pg_atomic_read_u64(&drain->keys) == 0;
	begin_round = round_is_over && pg_atomic_read_u64(&drain->round) != asked;
	if ((taken & REQUEST_FLUSH_ALL) || begin_round ||
		pg_atomic_read_u64(&drain->due) != asked)
	{
		schedule_make_all_due(schedule, true, now);
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
 * Forget the flushes of single keys, and release their pins.  For the process
 * that removes the buffer, or saves what it holds.
 */
void
requests_drop_flushes(SharedRequests *requests)
{
	dsa_pointer pointer;

	while (DsaPointerIsValid(pointer = requests->flushes_taken) ||
		   DsaPointerIsValid(pointer = pg_atomic_exchange_u64(&requests->flushes,
															  InvalidDsaPointer)))
	{
		SharedFlushRequest *request = dsa_get_address(shared_area, pointer);
		SharedCounter *counter = counter_at(request->counter);

		requests->flushes_taken = request->next;
		counter_clear_flag(counter, COUNTER_ASKED);
		counter_unpin(counter);
		dsa_free(shared_area, pointer);
	}
}

/*
 * The worker waits for a lock that another session has, or does not any more.
 * That session may itself wait for a drain, so those who wait are woken.
 */
void
requests_set_locked_out(SharedRequests *requests, bool locked_out)
{
	pg_atomic_write_u32(&requests->locked_out, locked_out ? 1 : 0);
	if (locked_out)
		ConditionVariableBroadcast(&shared_control->drain_cv);
}
