/*-------------------------------------------------------------------------
 *
 * batch.c
 *	  The worker's side of the counters: what is asked for, taken, settled
 *	  and given back.
 *
 * Only a buffer's worker calls what is here.  It takes the counts of due keys
 * into a batch, in a transaction; the transaction's callbacks settle the
 * batch or give it back, where nothing may fail and no lock is taken.
 *
 * The rules of the fields are at SharedCounter, in counters.h.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "batch.h"
#include "mb/pg_wchar.h"
#include "utils/timestamp.h"

/* the longest error text that is kept for a key */
#define ERROR_MAX_SIZE		256

/* A key's count was flushed or is nil, so a drain need not wait for it. */
static inline void
clear_drain(SharedBuffer *buffer, SharedCounter *counter)
{
	if (pg_atomic_read_u32(&counter->pins) & COUNTER_DRAIN)
	{
		Assert(pg_atomic_read_u64(&buffer->drain_keys) > 0);
		pg_atomic_fetch_and_u32(&counter->pins, ~COUNTER_DRAIN);
		pg_atomic_fetch_sub_u64(&buffer->drain_keys, 1);
	}
}

/* A key's last attempt failed. */
static inline void
note_failure(SharedBuffer *buffer, SharedCounter *counter)
{
	if (counter->failures == 0)
		pg_atomic_fetch_add_u32(&buffer->failing, 1);
	if (counter->failures < PG_UINT16_MAX)
		counter->failures++;
	pg_atomic_fetch_add_u64(&buffer->stats[STAT_FAILURES], 1);
}

/* A key is not, or not only, one of several that may be to blame. */
static inline void
clear_suspect(SharedCounter *counter)
{
	if (pg_atomic_read_u32(&counter->pins) & COUNTER_SUSPECT)
		pg_atomic_fetch_and_u32(&counter->pins, ~COUNTER_SUSPECT);
}

/* All keys of a round of drains are flushed: tell those who wait for it. */
static void
finish_round(SharedBuffer *buffer)
{
	uint64		round = pg_atomic_read_u64(&buffer->drain_round);

	if (pg_atomic_read_u64(&buffer->drain_done) == round)
		return;
	pg_atomic_write_u64(&buffer->drain_done, round);
	ConditionVariableBroadcast(&shared_control->drain_cv);
}

/* Do what sb_flush(), sb_flush_all() and sb_drain() asked for. */
void
batch_serve_requests(SharedBuffer *buffer, TimestampTz now)
{
	uint64		asked;
	bool		round_is_over;
	bool		begin_round;

	for (;;)
	{
		while (DsaPointerIsValid(buffer->flush_taken))
		{
			dsa_pointer pointer = buffer->flush_taken;
			SharedFlushRequest *request = dsa_get_address(shared_area, pointer);
			SharedCounter *counter = counter_at(request->counter);

			/* who asks from here on is heard again */
			if (pg_atomic_fetch_and_u32(&counter->pins, ~COUNTER_ASKED) &
				COUNTER_LINKED)
				schedule_make_due(buffer, counter, request->counter);
			buffer->flush_taken = request->next;
			pg_atomic_fetch_sub_u32(&counter->pins, 1);
			dsa_free(shared_area, pointer);
		}
		if (!DsaPointerIsValid(pg_atomic_read_u64(&buffer->flush_requests)))
			break;
		buffer->flush_taken = pg_atomic_exchange_u64(&buffer->flush_requests,
													 InvalidDsaPointer);
	}

	/* what was cleared is where its old time put it */
	if (pg_atomic_exchange_u32(&buffer->truncated, 0) != 0)
		schedule_sort_again(buffer, now);

	/* whoever asks now has published before */
	asked = pg_atomic_read_u64(&buffer->drain_asked);
	pg_memory_barrier();

	/*
	 * Those who wait for a drain do so in rounds.  A round begins when the
	 * last one is over, so that nobody waits for more than what was there
	 * before and what was there when he came.  But what he asked for is due
	 * at once.
	 */
	round_is_over = pg_atomic_read_u64(&buffer->drain_keys) == 0;
	begin_round = round_is_over &&
		pg_atomic_read_u64(&buffer->drain_round) != asked;
	if (pg_atomic_exchange_u32(&buffer->flush_all, 0) != 0 ||
		pg_atomic_read_u64(&buffer->drain_due) != asked || begin_round)
	{
		schedule_make_all_due(buffer, true, now);
		pg_atomic_write_u64(&buffer->drain_due, asked);
	}

	if (!round_is_over)
		return;
	if (begin_round)
	{
		finish_round(buffer);
		pg_atomic_write_u64(&buffer->drain_keys,
							schedule_mark_due(buffer, COUNTER_DRAIN));
		pg_atomic_write_u64(&buffer->drain_round, asked);
		if (pg_atomic_read_u64(&buffer->drain_keys) > 0)
			return;
	}
	finish_round(buffer);
}

/*
 * Take up to `limit' due keys into an empty batch; returns how many.
 *
 * Keys that failed before come alone, or with `mix_failing' like all others.
 * Keys of a batch that failed, one of which is to blame, come only with their
 * like, and no more than `suspect_limit' of them.
 * The caller is in a transaction whose callbacks settle the batch or give it
 * back.
 */
int
batch_take(CounterBatch *batch, const CounterTable *table, int limit,
		   int suspect_limit, bool mix_failing, TimestampTz now,
		   TimestampTz foreign_retry_at)
{
	SharedBuffer *buffer = batch->buffer;
	uint32		suspect = 0;
	dsa_pointer self;

	Assert(batch->nitems == 0);
	batch->discarded = 0;
	batch->nforeign = 0;
	while (batch->nitems < limit &&
		   DsaPointerIsValid(self = schedule_pop_due(buffer)))
	{
		SharedCounter *counter = counter_at(self);
		BatchItem  *item = &batch->items[batch->nitems];
		bool		alone = counter->failures > 0 && !mix_failing;
		uint32		is_suspect;

		is_suspect = pg_atomic_read_u32(&counter->pins) & COUNTER_SUSPECT;
		if (batch->nitems > 0 && (alone || is_suspect != suspect))
		{
			schedule_add_first(buffer, counter, self);
			break;
		}

		/* cleared, and counted anew meanwhile */
		if (!schedule_is_due(buffer, counter))
		{
			schedule_add(buffer, counter, self);
			continue;
		}

		/* nothing is added to these any more */
		if (!counter_is_readable(table, counter) &&
			pg_atomic_read_u64(&counter->count) != 0)
		{
			note_failure(buffer, counter);
			pg_atomic_write_u64(&counter->counted_at,
								(uint64) foreign_retry_at);
			schedule_add(buffer, counter, self);
			batch->nforeign++;
			continue;
		}

		/*
		 * From here on the order matters.  Who adds after the time is gone
		 * schedules the key anew; what was added before is in the count when
		 * we take it.
		 */
		item->counted_at = (TimestampTz) pg_atomic_read_u64(&counter->counted_at);
		counter->next = (uint64) now;
		pg_atomic_fetch_and_u32(&counter->pins, ~COUNTER_LINKED);
		pg_atomic_write_u64(&counter->counted_at, 0);
		counter->version++;
		pg_memory_barrier();
		item->count = (int64) pg_atomic_exchange_u64(&counter->count, 0);
		pg_atomic_write_u64(&counter->in_flight, (uint64) item->count);
		pg_write_barrier();
		counter->version++;

		if (item->count == 0)
		{
			clear_drain(buffer, counter);
			counters_clear_failure(buffer, counter);
			clear_suspect(counter);
			shared_note_idle(buffer, now);
			continue;
		}

		item->counter = counter;
		item->taken_at = now;
		item->self = self;
		item->verdict = VERDICT_AGAIN;
		item->retry_at = 0;
		if (batch->nitems++ == 0)
		{
			suspect = is_suspect;
			if (suspect)
				limit = Min(limit, suspect_limit);
		}
		pg_atomic_fetch_add_u64(&buffer->in_flight, (uint64) item->count);
		if (alone)
			break;
	}
	return batch->nitems;
}

/* The end of an item's flight: its count goes back, or away. */
static void
land(SharedCounter *counter, int64 back)
{
	counter->version++;
	pg_write_barrier();
	pg_atomic_write_u64(&counter->in_flight, 0);
	if (back != 0)
		pg_atomic_fetch_add_u64(&counter->count, (uint64) back);
	pg_write_barrier();
	counter->version++;
}

/*
 * The batch is stored: called when its transaction has committed.  Takes no
 * lock, cannot fail.
 */
void
batch_settle(CounterBatch *batch)
{
	SharedBuffer *buffer = batch->buffer;
	uint64		sum = 0;
	uint64		nkeys = 0;

	if (batch->nitems == 0)
		return;
	for (int i = 0; i < batch->nitems; i++)
	{
		BatchItem  *item = &batch->items[i];

		/* passed over: see batch_pass_over() */
		if (item->count == 0)
			continue;
		land(item->counter, 0);
		counters_clear_failure(buffer, item->counter);
		clear_suspect(item->counter);
		shared_note_idle(buffer, item->taken_at);
		sum += (uint64) item->count;
		nkeys++;
	}
	pg_atomic_fetch_add_u64(&buffer->in_flight, -sum);
	pg_atomic_fetch_add_u64(&buffer->stats[STAT_FLUSHED_COUNT], sum);
	pg_atomic_fetch_add_u64(&buffer->stats[STAT_FLUSHED_KEYS], nkeys);
	pg_atomic_write_u64(&buffer->last_flush,
						(uint64) GetCurrentTimestamp());

	/* who waited for a drain finds the sums as they are now */
	for (int i = 0; i < batch->nitems; i++)
		if (batch->items[i].count != 0)
			clear_drain(buffer, batch->items[i].counter);
	batch->nitems = 0;
}

/* Give one item back, and schedule it. */
static void
give_back_item(SharedBuffer *buffer, BatchItem *item)
{
	SharedCounter *counter = item->counter;
	TimestampTz counted_at;
	uint32		pins;

	if (item->verdict == VERDICT_BACK_OFF)
	{
		clear_suspect(counter);
		counted_at = item->retry_at;
	}
	else
	{
		if (item->verdict == VERDICT_SUSPECT)
			pg_atomic_fetch_or_u32(&counter->pins, COUNTER_SUSPECT);

		/* it may have been taken before it was due */
		counted_at = Min(item->counted_at,
						 schedule_due_now(buffer, counter));
	}

	/*
	 * Somebody may have scheduled the key anew, for what was added since it
	 * was taken.  Then it is on the inbox, and is sorted in by the time that
	 * it has when the inbox is worked off: this one.
	 */
	land(counter, item->count);
	pg_atomic_write_u64(&counter->counted_at, (uint64) Max(counted_at, 1));
	pins = pg_atomic_fetch_or_u32(&counter->pins, COUNTER_LINKED);
	if (pins & COUNTER_LINKED)
		return;
	if (item->verdict == VERDICT_BACK_OFF)
		schedule_add(buffer, counter, item->self);
	else
		schedule_add_first(buffer, counter, item->self);
}

/*
 * The batch is not stored: called when its transaction has rolled back, or
 * when the process ends.  Does to each item what its verdict says.  Takes no
 * lock, cannot fail: adding to the list of due keys looks only at counters
 * that this process has mapped.
 */
void
batch_give_back(CounterBatch *batch)
{
	SharedBuffer *buffer = batch->buffer;
	uint64		sum = 0;

	if (batch->nitems == 0)
		return;

	/* backwards, so that those due first are first again */
	for (int i = batch->nitems - 1; i >= 0; i--)
	{
		BatchItem  *item = &batch->items[i];

		if (item->count == 0)
			continue;
		sum += (uint64) item->count;
		if (item->verdict == VERDICT_BACK_OFF ||
			item->verdict == VERDICT_DISCARD)
			note_failure(buffer, item->counter);
		switch (item->verdict)
		{
			case VERDICT_AGAIN:
			case VERDICT_SUSPECT:
			case VERDICT_BACK_OFF:
				give_back_item(buffer, item);
				break;
			case VERDICT_DISCARD:
				land(item->counter, 0);
				counters_clear_failure(buffer, item->counter);
				clear_suspect(item->counter);
				clear_drain(buffer, item->counter);
				shared_note_idle(buffer, item->taken_at);
				batch->discarded =
					(int64) ((uint64) batch->discarded + (uint64) item->count);
				break;
		}
	}
	batch->nitems = 0;
	pg_atomic_fetch_add_u64(&buffer->in_flight, -sum);
	pg_atomic_fetch_add_u64(&buffer->stats[STAT_DISCARDED],
							(uint64) batch->discarded);
}

/*
 * Leave an item of the batch out of it: it is due again, before all others.
 */
void
batch_pass_over(CounterBatch *batch, int i)
{
	BatchItem  *item = &batch->items[i];

	Assert(item->count != 0 && item->verdict == VERDICT_AGAIN);
	pg_atomic_fetch_add_u64(&batch->buffer->in_flight, -(uint64) item->count);
	give_back_item(batch->buffer, item);
	item->count = 0;
}

/*
 * Keep the words for which items of a finished batch failed, and forget those
 * of items that did not.  When memory is out, what was kept before stays.
 */
void
batch_tidy(CounterBatch *batch, int nitems, const char *message)
{
	SharedBuffer *buffer = batch->buffer;
	dsa_pointer error = InvalidDsaPointer;

	Assert(batch->nitems == 0);
	for (int i = 0; i < nitems; i++)
	{
		BatchItem  *item = &batch->items[i];

		if (item->counter->failures == 0)
		{
			if (DsaPointerIsValid(item->counter->error))
				counters_replace_error(buffer, item->counter, InvalidDsaPointer);
		}
		else if (item->verdict == VERDICT_BACK_OFF && message != NULL)
		{
			if (!DsaPointerIsValid(error))
			{
				int			len = pg_mbcliplen(message, strlen(message),
											   ERROR_MAX_SIZE - 1);
				SharedError *shared;

				/* the key may have failed with these words before */
				shared = dsa_get_address(shared_area, item->counter->error);
				if (shared != NULL && strlen(shared->message) == len &&
					memcmp(shared->message, message, len) == 0)
					error = item->counter->error;
				else
				{
					error = dsa_allocate_extended(shared_area,
												  offsetof(SharedError, message) +
												  len + 1,
												  DSA_ALLOC_NO_OOM);
					if (!DsaPointerIsValid(error))
						return;
					shared = dsa_get_address(shared_area, error);
					shared->nkeys = 0;
					memcpy(shared->message, message, len);
					shared->message[len] = '\0';
				}
			}
			counters_replace_error(buffer, item->counter, error);
		}
	}
}
