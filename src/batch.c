/*-------------------------------------------------------------------------
 *
 * batch.c
 *	  The worker's side of the shared counters: take, commit, restore, free.
 *
 * Only a buffer's worker calls these functions.  It takes the counts of due
 * keys into a batch, in a transaction; the transaction's callbacks commit the
 * batch or restore it, where nothing may fail and no lock is taken.
 *
 * The rules of the fields are at SharedCounter, in counter.h.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "batch.h"
#include "utils/memutils.h"
#include "utils/timestamp.h"

/* after freeing this many keys, return empty blocks to the system */
#define TRIM_MIN_KEYS		1000

/* Note that a key's last attempt failed. */
static inline void
note_failure(SharedBuffer *buffer, SharedCounter *counter)
{
	if (counter->failures == 0)
		pg_atomic_fetch_add_u32(&buffer->table.failing, 1);
	if (counter->failures < PG_UINT16_MAX)
		counter->failures++;
	registry_count(buffer, STAT_FAILURES, 1);
}

/* A key is no longer a suspect. */
static inline void
clear_suspect(SharedCounter *counter)
{
	if (counter_has_flag(counter, COUNTER_SUSPECT))
		counter_clear_flag(counter, COUNTER_SUSPECT);
}

/*
 * The worker has claimed a buffer: from here on, batches are of its keys.  The
 * space of former ones stays.
 */
void
batch_begin(CounterBatch *batch, SharedBuffer *buffer)
{
	Assert(batch->nitems == 0);
	batch->buffer = buffer;
	batch->discarded = 0;
	batch->nunreadable = 0;
	batch->ntaken = 0;
	batch->nkept = 0;
	batch->had_suspects = false;
	batch->had_failing = false;
	batch->suspect_limit = Max(batch->size, 1);
	batch->mix_failing = false;
}

/*
 * Allocate space for batches of `size' keys.  Raises an error if memory is
 * out; then there is no space.  The batch must be empty.
 */
void
batch_set_size(CounterBatch *batch, int size)
{
	Assert(batch->nitems == 0);
	if (batch->size == size)
		return;
	if (batch->items)
		pfree(batch->items);
	batch->items = NULL;
	batch->size = 0;
	batch->items = MemoryContextAllocHuge(TopMemoryContext,
										  size * sizeof(BatchItem));
	batch->size = size;
	batch->suspect_limit = size;
}

/*
 * Move a counter's count in flight, and note it in an item.
 *
 * The order matters: a process that adds after `counted_at' was set to 0
 * schedules the key anew, and what was added before that is in the count that
 * we take.
 */
static void
take_counter(BatchItem *item, CounterRef ref, ClockTime now)
{
	SharedCounter *counter = ref.counter;

	item->counted_at = (ClockTime) pg_atomic_read_u64(&counter->counted_at);
	counter->next = (uint64) now;
	counter_clear_flag(counter, COUNTER_LINKED);
	pg_atomic_write_u64(&counter->counted_at, 0);
	counter_begin_change(counter);
	item->count = (int64) pg_atomic_exchange_u64(&counter->count, 0);
	pg_atomic_write_u64(&counter->in_flight, (uint64) item->count);
	counter_end_change(counter);
	item->ref = ref;
	item->taken_at = now;
	item->outcome = BATCH_AGAIN;
	item->later = false;
	item->retry_at = 0;
}

/*
 * A key has nothing counted: clear its flags and failures, and note it as
 * idle.
 */
static void
clear_idle(SharedBuffer *buffer, SharedCounter *counter, ClockTime since)
{
	requests_clear_key(&buffer->requests, counter);
	table_clear_failure(&buffer->table, counter);
	clear_suspect(counter);
	schedule_note_idle(&buffer->schedule, since);
}

/*
 * Take due keys into an empty batch, up to `max_keys', which is at most its
 * size.  Returns their number.
 *
 * Keys that failed before are taken alone, or with `mix_failing' like all
 * others.  Suspects, which are keys of a failed batch of which one is to
 * blame, are only taken together with other suspects, up to `suspect_limit' of
 * them.  Keys that cannot be read under the table's shape are scheduled for
 * `unreadable_retry_at'.
 *
 * The caller is the buffer's worker, in a transaction whose callbacks commit
 * or restore the batch.
 */
int
batch_take(CounterBatch *batch, const CounterTable *table, int max_keys,
		   ClockTime now, ClockTime unreadable_retry_at)
{
	SharedBuffer *buffer = batch->buffer;
	SharedSchedule *schedule = &buffer->schedule;
	int			limit = max_keys;
	bool		suspects = false;
	dsa_pointer self;

	Assert(registry_is_mine(buffer));
	Assert(batch->nitems == 0);
	Assert(max_keys > 0 && max_keys <= batch->size);
	batch->discarded = 0;
	batch->nunreadable = 0;
	batch->had_failing = false;

	/* before the first count is taken: counter_begin_change() is a barrier */
	pg_atomic_write_u32(&buffer->in_flight.xid, InvalidTransactionId);

	while (batch->nitems < limit &&
		   DsaPointerIsValid(self = schedule_pop_due(schedule)))
	{
		CounterRef	ref = counter_ref(self);
		SharedCounter *counter = ref.counter;
		BatchItem  *item = &batch->items[batch->nitems];
		bool		alone = counter->failures > 0 && !batch->mix_failing;
		bool		is_suspect = counter_has_flag(counter, COUNTER_SUSPECT);

		if (batch->nitems > 0 && (alone || is_suspect != suspects))
		{
			schedule_add_first(schedule, ref);
			break;
		}

		/* cleared, and counted anew since: no request is for that */
		if (!schedule_is_due(schedule, counter))
		{
			requests_clear_key(&buffer->requests, counter);
			schedule_add(schedule, ref);
			continue;
		}

		/* nothing can be added to such keys any more */
		if (!table_can_read(table, counter) &&
			pg_atomic_read_u64(&counter->count) != 0)
		{
			note_failure(buffer, counter);
			pg_atomic_write_u64(&counter->counted_at,
								(uint64) unreadable_retry_at);
			schedule_add(schedule, ref);
			batch->nunreadable++;
			continue;
		}

		take_counter(item, ref, now);
		if (item->count == 0)
		{
			clear_idle(buffer, counter, now);
			continue;
		}
		batch->had_failing |= counter->failures > 0;
		if (batch->nitems++ == 0)
		{
			suspects = is_suspect;
			if (suspects)
				limit = Min(limit, batch->suspect_limit);
		}
		pg_atomic_fetch_add_u64(&buffer->totals.in_flight, (uint64) item->count);
		if (alone)
			break;
	}
	batch->had_suspects = suspects;
	batch->ntaken = batch->nkept = batch->nitems;
	return batch->ntaken;
}

/* The counts of a batch begin to leave their flight: see SharedInFlight. */
static void
end_flight(SharedBuffer *buffer)
{
	/* this is a barrier */
	pg_atomic_fetch_add_u32(&buffer->in_flight.ended, 1);
}

/* End an item's time in flight.  `back' is what returns to the count. */
static void
finish_in_flight(SharedCounter *counter, int64 back)
{
	counter_begin_change(counter);
	pg_atomic_write_u64(&counter->in_flight, 0);
	if (back != 0)
		pg_atomic_fetch_add_u64(&counter->count, (uint64) back);
	counter_end_change(counter);
}

/*
 * The batch's transaction is about to commit: called before it has.  Tells which
 * one it is.  Takes no lock, cannot fail.
 */
void
batch_prepare_commit(CounterBatch *batch)
{
	if (batch->nitems == 0)
		return;
	Assert(registry_is_mine(batch->buffer));
	pg_atomic_write_u32(&batch->buffer->in_flight.xid,
						GetTopTransactionIdIfAny());

	/* before anybody can see that it has committed */
	pg_memory_barrier();
}

/*
 * The batch was stored: called when its transaction has committed.  Takes no
 * lock, cannot fail.
 */
void
batch_commit(CounterBatch *batch)
{
	SharedBuffer *buffer = batch->buffer;
	uint64		sum = 0;
	uint64		nkeys = 0;

	if (batch->nitems == 0)
		return;
	Assert(registry_is_mine(buffer));
	end_flight(buffer);
	for (int i = 0; i < batch->nitems; i++)
	{
		BatchItem  *item = &batch->items[i];

		/* passed over: see batch_pass_over() */
		if (item->count == 0)
			continue;
		finish_in_flight(item->ref.counter, 0);
		table_clear_failure(&buffer->table, item->ref.counter);
		clear_suspect(item->ref.counter);
		schedule_note_idle(&buffer->schedule, item->taken_at);
		sum += (uint64) item->count;
		nkeys++;
	}
	pg_atomic_fetch_add_u64(&buffer->totals.in_flight, -sum);
	registry_count(buffer, STAT_FLUSHED_COUNT, sum);
	registry_count(buffer, STAT_FLUSHED_KEYS, nkeys);
	pg_atomic_write_u64(&buffer->totals.last_flush,
						(uint64) GetCurrentTimestamp());

	/* after the sums, which sessions that wait for a drain will read */
	for (int i = 0; i < batch->nitems; i++)
		if (batch->items[i].count != 0)
			requests_clear_key(&buffer->requests, batch->items[i].ref.counter);
	batch->nitems = 0;
}

/* Return the count of an item to its counter, and schedule the counter. */
static void
restore_item(SharedBuffer *buffer, BatchItem *item)
{
	SharedCounter *counter = item->ref.counter;
	ClockTime	counted_at;

	if (item->outcome == BATCH_BACK_OFF)
	{
		clear_suspect(counter);
		counted_at = item->retry_at;
	}
	else
	{
		if (item->outcome == BATCH_SUSPECT)
			counter_set_flag(counter, COUNTER_SUSPECT);

		/* due now even if it was taken before it was due */
		counted_at = Min(item->counted_at,
						 schedule_due_now(&buffer->schedule, counter));
	}

	/*
	 * Another process may have scheduled the key anew, for what was added
	 * since it was taken.  Then it is on the inbox.  When the worker sorts
	 * the inbox in, it uses the time that the counter has by then: the one
	 * that we set here.
	 */
	finish_in_flight(counter, item->count);
	pg_atomic_write_u64(&counter->counted_at, (uint64) Max(counted_at, 1));
	if (!counter_link(counter))
		return;
	if (item->outcome == BATCH_BACK_OFF)
		schedule_add(&buffer->schedule, item->ref);
	else
		schedule_add_first(&buffer->schedule, item->ref);
}

/*
 * The batch was not stored: called when its transaction has rolled back, also
 * when the process ends.  Treats each item according to its outcome.  Takes no
 * lock, cannot fail: adding to the list of due keys only accesses counters
 * that this process has mapped.
 */
void
batch_restore(CounterBatch *batch)
{
	SharedBuffer *buffer = batch->buffer;
	uint64		sum = 0;

	if (batch->nitems == 0)
		return;
	Assert(registry_is_mine(buffer));
	end_flight(buffer);

	/* backwards, so that keys that were due first are first again */
	for (int i = batch->nitems - 1; i >= 0; i--)
	{
		BatchItem  *item = &batch->items[i];

		if (item->count == 0)
			continue;
		sum += (uint64) item->count;
		if (item->outcome == BATCH_BACK_OFF ||
			item->outcome == BATCH_DISCARD)
			note_failure(buffer, item->ref.counter);
		switch (item->outcome)
		{
			case BATCH_AGAIN:
			case BATCH_SUSPECT:
			case BATCH_BACK_OFF:
				restore_item(buffer, item);
				break;
			case BATCH_DISCARD:
				finish_in_flight(item->ref.counter, 0);
				clear_idle(buffer, item->ref.counter, item->taken_at);
				batch->discarded =
					(int64) ((uint64) batch->discarded + (uint64) item->count);
				break;
		}
	}
	batch->nitems = 0;
	pg_atomic_fetch_add_u64(&buffer->totals.in_flight, -sum);
	registry_count(buffer, STAT_DISCARDED, (uint64) batch->discarded);
}

/*
 * Remove an item from the batch.  It is due again, before all others.  Takes
 * no lock, cannot fail.
 */
void
batch_pass_over(CounterBatch *batch, int i)
{
	BatchItem  *item = &batch->items[i];

	Assert(item->count != 0 && item->outcome == BATCH_AGAIN);
	pg_atomic_fetch_add_u64(&batch->buffer->totals.in_flight, -(uint64) item->count);
	restore_item(batch->buffer, item);
	item->count = 0;
	batch->nkept--;
}

/*
 * Pass over the items that are marked with `later': they are due again in the
 * order in which they were before.  Takes no lock, cannot fail.
 */
void
batch_pass_over_later(CounterBatch *batch)
{
	for (int i = batch->nitems - 1; i >= 0; i--)
		if (batch->items[i].later && batch->items[i].count != 0)
			batch_pass_over(batch, i);
}

/*
 * Tidy up after a batch: store the error message for the items that failed,
 * and free the messages of the items that did not.  If memory is out, the
 * previous messages stay.  Takes SharedTable.lock.
 */
void
batch_tidy(CounterBatch *batch, int nitems, const char *message)
{
	SharedBuffer *buffer = batch->buffer;

	Assert(batch->nitems == 0);
	for (int i = 0; i < nitems; i++)
	{
		BatchItem  *item = &batch->items[i];
		SharedCounter *counter = item->ref.counter;

		if (counter->failures == 0)
		{
			if (DsaPointerIsValid(counter->error))
				(void) table_set_error(&buffer->table, counter, NULL);
		}
		else if (item->outcome == BATCH_BACK_OFF && message != NULL &&
				 !table_set_error(&buffer->table, counter, message))
			return;
	}
}

/*
 * A key that cannot be read cannot be converted, either: note why.  It stays due
 * when it is.  Takes SharedTable.lock.
 */
void
batch_fail_unreadable(SharedBuffer *buffer, SharedCounter *counter,
					  const char *message)
{
	uint64		at = pg_atomic_read_u64(&counter->counted_at);

	Assert(registry_is_mine(buffer));
	if (counter->failures == 0)
	{
		note_failure(buffer, counter);

		/* for a failing key, it is the time itself when the key is due */
		if (at != 0)
			(void) pg_atomic_compare_exchange_u64(&counter->counted_at, &at,
												  at + buffer->schedule.interval);
	}
	(void) table_set_error(&buffer->table, counter, message);
}

/*
 * May the counter be freed?  If it is empty, but not for long enough, notes it
 * as idle.  Its partition is locked exclusively, so it cannot be pinned.
 */
static bool
reap_counter(SharedBuffer *buffer, SharedCounter *counter,
			 ClockTime idle_before)
{
	uint32		pins = pg_atomic_read_u32(&counter->pins);

	if ((pins & COUNTER_LINKED) != 0 ||
		pg_atomic_read_u64(&counter->count) != 0 ||
		pg_atomic_read_u64(&counter->in_flight) != 0)
		return false;
	if (pins == 0 && (ClockTime) counter->next <= idle_before)
		return true;
	schedule_note_idle(&buffer->schedule, (ClockTime) counter->next);
	return false;
}

/*
 * Free the counters that are empty, not pinned, and were last taken before
 * `idle_before'.  Other empty ones are noted as idle again.  Scans the whole
 * table, with its partitions locked exclusively.
 */
void
batch_reap(SharedBuffer *buffer, const CounterTable *table,
		   ClockTime idle_before)
{
	TableScan	scan;
	CounterRef	ref;
	uint64		nfreed = 0;

	Assert(registry_is_mine(buffer));
	space_note_use();
	schedule_forget_idle(&buffer->schedule);
	table_begin_scan(&scan, table, true);
	while (table_begin_portion(&scan))
		while ((ref = table_next(&scan)).counter != NULL)
			if (reap_counter(buffer, ref.counter, idle_before))
			{
				table_delete_current(&buffer->table, &scan, ref);
				nfreed++;
			}
	if (nfreed >= TRIM_MIN_KEYS ||
		(nfreed > 0 && (table_nkeys(&buffer->table) == 0 || space_is_sparse())))
		space_trim();
}

/*
 * Remove the shapes that no key has any more, and the idle keys.  The caller
 * holds AccessExclusiveLock on the relation.  Scans the whole table.
 */
void
batch_remove_shapes(SharedBuffer *buffer, ClockTime now)
{
	CounterTable table = {.partitions = NULL};
	TableScan	scan;
	CounterRef	ref;
	uint32		used = 0;

	table_attach(&buffer->table, &table);
	batch_reap(buffer, &table, now);
	table_begin_scan(&scan, &table, false);
	while (table_begin_portion(&scan))
		while ((ref = table_next(&scan)).counter != NULL)
			used |= (uint32) 1 << ref.counter->shape;
	table_detach(&table);
	table_remove_shapes(&buffer->table, used);
}
