/*-------------------------------------------------------------------------
 *
 * counters.c
 *	  A transaction's side of the shared counters: pin, add, unpin, clear.
 *
 * A committing transaction pins its counters where an error is still possible,
 * and adds through the pins once it has committed, where none is.  TRUNCATE
 * clears counts through pins, when it commits.  The worker's side, which takes
 * counts, is in batch.c.  All of this is atomic operations.
 *
 * What is counted for an idle key is scheduled here, too, by the buffer's
 * shared settings.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/int.h"
#include "common/pg_prng.h"
#include "counters.h"
#include "postmaster/postmaster.h"
#include "storage/lmgr.h"
#include "utils/memutils.h"

StaticAssertDecl(MAX_BACKENDS < MODERATE_COUNT / MODERATE_DELTA / 2,
				 "moderate deltas of all backends must fit");
StaticAssertDecl(MAX_BACKENDS < COUNTER_PINS,
				 "pins of all backends must fit");

/* ------------------------------------------------------------------------
 * Pinning
 * ------------------------------------------------------------------------
 */

/*
 * Raise an error if the counts are being saved because the server is stopping.
 * Must be called after counters were pinned and before anything is added to
 * them.  The pins stay, for the caller's transaction to release.
 */
void
counters_check_open(void)
{
	if (unlikely(registry_is_closed()))
		ereport(ERROR,
				(errcode(ERRCODE_ADMIN_SHUTDOWN),
				 errmsg("cannot count because the server is shutting down"),
				 errdetail("The counts that statbuffer holds are being saved.")));
}

static inline void
release_pin(CounterPin *pin)
{
	counter_unpin(pin->ref.counter);
	pin->ref.counter = NULL;
}

/*
 * Put a counter that was just linked on the inbox, and wake the worker if it
 * sleeps beyond `due_at'.
 */
static void
push(SharedBuffer *buffer, CounterRef ref, ClockTime due_at)
{
	schedule_push(&buffer->schedule, ref);
	if (schedule_lower(&buffer->schedule, due_at))
		registry_wake(buffer);
}

/*
 * Release a pinned counter without adding to it.  Takes no lock, cannot fail.
 */
void
counters_unpin(SharedBuffer *buffer, CounterPin *pin)
{
	SharedCounter *counter = pin->ref.counter;

	if (counter == NULL)
		return;

	/*
	 * A counter that nothing was ever added to is on no list, and the worker
	 * does not know of it.  (One that was emptied has a time in `next'.) Link
	 * it without a time, so that the worker finds it to be idle.
	 */
	if (counter->next == 0 &&
		pg_atomic_read_u64(&counter->counted_at) == 0 &&
		counter_link(counter))
		push(buffer, pin->ref, clock_now());
	release_pin(pin);
}

/*
 * Can `delta' be added, even if all others that have pinned the counter are
 * going to add a moderate delta?  A large delta must not take the count beyond
 * `most', or must at least bring it nearer to 0.
 */
static bool
fits(int64 count, int64 delta, int64 most, uint32 others)
{
	int64		room = Min(others, MAX_BACKENDS) * MODERATE_DELTA;
	int64		sum;
	int64		end;

	if (pg_add_s64_overflow(count, delta, &sum) ||
		pg_add_s64_overflow(sum, sum < 0 ? -room : room, &end))
		return false;
	if (count_is_within(delta, MODERATE_DELTA))
		return true;
	return count_is_within(delta, most) &&
		(count_is_within(sum, most) ||
		 (count < 0 ? sum > count && sum < 0 : sum < count && sum > 0));
}

/* Raise the error that a delta does not fit. */
static void
report_no_room(int64 held, int64 delta)
{
	/* users without the SELECT privilege can only add moderate deltas */
	if (count_is_within(delta, MODERATE_DELTA))
		ereport(ERROR,
				(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
				 errmsg("count out of range for type bigint"),
				 errhint("The key must be flushed first.")));
	ereport(ERROR,
			(errcode(ERRCODE_NUMERIC_VALUE_OUT_OF_RANGE),
			 errmsg("count is too large"),
			 errdetail("The key has " INT64_FORMAT " counted and not yet stored, and " INT64_FORMAT " was to be added. Transactions that add more than " INT64_FORMAT " can take it to " INT64_FORMAT " at most.",
					   held, delta, MODERATE_DELTA, LARGE_COUNT),
			 errhint("Flush the key first, or count in a larger unit.")));
}

/*
 * Keys were created, or found no room: if the buffer is near its bound of
 * memory, or at it, request an early flush.
 */
static void
flush_if_short(SharedBuffer *buffer, TableResult result, uint64 max_memory)
{
	if ((result == TABLE_BUFFER_FULL ||
		 table_is_short(&buffer->table, max_memory)) &&
		requests_ask_early(&buffer->requests))
		registry_wake(buffer);
}

/* Find or create the counter of a key and pin it. */
static TableResult
find_or_create(SharedBuffer *buffer, CounterTable *table,
			   const KeyBytes *key, uint64 max_memory, CounterRef *ref)
{
	TableResult result = table_pin_or_create(&buffer->table, table, key,
											 max_memory, ref);

	if (unlikely(result != TABLE_FOUND))
		flush_if_short(buffer, result, max_memory);
	return result;
}

/*
 * Is the count of a counter that the process has pinned moderate, with and
 * without what is in flight, which may come back, or not?
 */
static inline bool
is_moderate(SharedCounter *counter)
{
	int64		count,
				in_flight;

	/* reading after pinning: the pin, an atomic operation, orders this */
	counter_read(counter, &count, &in_flight);
	return count_is_within(count, MODERATE_COUNT) &&
		count_is_within(count + in_flight, MODERATE_COUNT);
}

/*
 * Take a turn for a delta that is not moderate, to the end of the
 * (sub)transaction.
 */
static void
take_turn(SharedBuffer *buffer)
{
	LOCKTAG		tag;

	registry_set_locktag(&tag, &buffer->key, REGISTRY_LOCK_LARGE);
	(void) LockAcquire(&tag, ExclusiveLock, false, false);
}

/*
 * Prepare for counters_pin_held() to be called for this delta in a subtransaction:
 * if that is rolled back, its pins stay as good.
 */
void
counters_prepare_to_pin(SharedBuffer *buffer, int64 delta)
{
	if (!count_is_within(delta, MODERATE_DELTA))
		take_turn(buffer);
}

/*
 * Find or create the counter of a key and pin it, and check that `delta' can
 * be added to it.  If `delta' is large, it must not take the count beyond
 * `most'.  Everything that can fail, fails here.
 *
 * `max_memory' is the bound of the buffer's keys.  If there is no room for a
 * new key, nothing is pinned, and table_is_full() is true of the result.
 * Otherwise the caller must call counters_add() or counters_unpin() in any case.
 * On error nothing is pinned.  May take the lock REGISTRY_LOCK_LARGE, to the end
 * of the transaction.
 *
 * A moderate delta that finds a moderate count can be added without knowing
 * what others are about to add: such deltas, of all backends together, are
 * less than MODERATE_COUNT / 2, and there is at most one large one, of up to
 * LARGE_COUNT. All others take turns: they hold a lock from before the check
 * until the transaction ends.  So large increments wait for each other, and
 * moderate ones only if the count is no longer moderate.
 */
static TableResult
pin_counter(SharedBuffer *buffer, CounterTable *table,
			const KeyBytes *key, int64 delta, int64 most, uint64 max_memory,
			CounterPin *pin)
{
	bool		moderate = count_is_within(delta, MODERATE_DELTA);
	TableResult result;
	uint32		others;
	int64		count,
				in_flight;

	Assert(registry_is_usable(buffer));

	/* a new counter that is released wakes the worker, so lock first */
	for (bool locked = !moderate;; locked = true)
	{
		if (unlikely(locked))
			take_turn(buffer);
		result = find_or_create(buffer, table, key, max_memory, &pin->ref);
		pin->locked = locked;
		if (unlikely(pin->ref.counter == NULL))
			return result;

		if (likely(moderate && is_moderate(pin->ref.counter)))
			return result;
		if (locked)
			break;

		counters_unpin(buffer, pin);
	}

	others = (pg_atomic_read_u32(&pin->ref.counter->pins) & COUNTER_PINS) - 1;
	counter_read(pin->ref.counter, &count, &in_flight);
	if (!fits(count, delta, most, others) ||
		!fits(count + in_flight, delta, most, others))
	{
		counters_unpin(buffer, pin);
		report_no_room(count + in_flight, delta);
	}
	return result;
}

/*
 * Pin the counter of a key to which a transaction adds `delta', as
 * pin_counter() does.
 */
TableResult
counters_pin(SharedBuffer *buffer, CounterTable *table,
			 const KeyBytes *key, int64 delta, CounterPin *pin)
{
	return pin_counter(buffer, table, key, delta, LARGE_COUNT,
					   registry_max_memory(buffer), pin);
}

/*
 * Pin the counters of keys to which a transaction adds moderate deltas: up to
 * HASH_MANY different keys of one table_group().  For each that has none, one is
 * created if there is room.  `nexpected' is how many more keys of the group are
 * likely to follow.
 *
 * Sets each of `pins' to a pin, or to none: then the caller must call
 * counters_pin() for it, which tells why, or waits.  The pins are valid at any
 * time, so that the caller's transaction can release them if this raises an
 * error.
 */
void
counters_pin_many(SharedBuffer *buffer, const CounterTable *table,
				  const KeyBytes *keys, CounterPin **pins, int n,
				  uint32 nexpected)
{
	uint64		max_memory = registry_max_memory(buffer);
	HashItem	items[HASH_MANY];
	int			numbers[HASH_MANY];
	int			nnew = 0;
	int			nallocated;
	int			ncreated;

	Assert(registry_is_usable(buffer) && n <= HASH_MANY);
	for (int i = 0; i < n; i++)
	{
		items[i].key = keys[i];
		pins[i]->ref.counter = NULL;
		pins[i]->locked = false;
	}
	table_pin_many(table, items, n);

	/* note what is pinned, before anything can fail */
	for (int i = 0; i < n; i++)
		pins[i]->ref = items[i].ref;
	for (int i = 0; i < n; i++)
	{
		if (pins[i]->ref.counter == NULL)
		{
			items[nnew].key = keys[i];
			numbers[nnew++] = i;
		}
		else if (unlikely(!is_moderate(pins[i]->ref.counter)))
			counters_unpin(buffer, pins[i]);
	}
	if (nnew == 0)
		return;

	table_reserve(table, &items[0].key,
				  nnew + (uint64) nexpected * nnew / n);
	nallocated = table_allocate_many(&buffer->table, table, items, nnew,
									 max_memory);
	if (nallocated == 0)
		return;
	ncreated = table_insert_many(&buffer->table, table, items, nallocated);
	if (ncreated < 0)
		return;
	for (int i = 0; i < ncreated; i++)
		pins[numbers[i]]->ref = items[i].ref;
	flush_if_short(buffer, TABLE_CREATED, max_memory);

	/* another process has just made the next key, or memory is short */
	table_free_many(&items[ncreated], nallocated - ncreated);
}

/*
 * Like counters_pin(), for an increment outside of the transaction.  Also
 * raises the error of counters_check_open(); on error nothing is pinned.
 */
TableResult
counters_pin_now(SharedBuffer *buffer, CounterTable *table,
				 const KeyBytes *key, int64 delta, CounterPin *pin)
{
	TableResult result = counters_pin(buffer, table, key, delta, pin);

	if (unlikely(registry_is_closed()))
	{
		counters_unpin(buffer, pin);
		counters_check_open();
	}
	return result;
}

/*
 * Would counters_pin() find room for a key now?  Returns what it would return,
 * and requests an early flush as it would.  If it would create the key, so does
 * this, and leaves it to the worker.
 */
TableResult
counters_probe(SharedBuffer *buffer, CounterTable *table,
			   const KeyBytes *key)
{
	CounterPin	pin;
	TableResult result;

	Assert(registry_is_usable(buffer));
	result = find_or_create(buffer, table, key, registry_max_memory(buffer),
							&pin.ref);
	counters_unpin(buffer, &pin);
	return result;
}

/*
 * Like counters_pin(), for a count that was saved, or is held for another key.
 * It was accepted before, so it may exceed the buffer's bound of memory, and what
 * others may add.  If there is no room otherwise, that is an error.
 */
void
counters_pin_held(SharedBuffer *buffer, CounterTable *table,
				  const KeyBytes *key, int64 delta, CounterPin *pin)
{
	TableResult result = pin_counter(buffer, table, key, delta, PG_INT64_MAX,
									 0, pin);

	if (pin->ref.counter == NULL)
		table_report_full(result, NULL);
}

/*
 * Release the lock that counters_pin() took, after the delta was added: it is
 * in the count now, so nobody has to wait for it.
 */
void
counters_end_turn(SharedBuffer *buffer)
{
	LOCKTAG		tag;

	registry_set_locktag(&tag, &buffer->key, REGISTRY_LOCK_LARGE);
	LockRelease(&tag, ExclusiveLock, false);
}

/* ------------------------------------------------------------------------
 * Adding
 * ------------------------------------------------------------------------
 */

/*
 * If a scheduled key has a large count, request an early flush, so that there
 * is room for the increments of others.  That would not help a key that cannot
 * be flushed.
 */
static inline void
flush_if_large(SharedBuffer *buffer, SharedCounter *counter)
{
	if (unlikely(!count_is_within((int64) pg_atomic_read_u64(&counter->count),
								  LARGE_COUNT)) &&
		counter->failures == 0 &&
		(pg_atomic_read_u32(&buffer->requests.asked) & REQUEST_FLUSH_EARLY) == 0)
		registry_ask(buffer, REQUEST_FLUSH_EARLY);
}

/*
 * Schedule a counter that something was added to, unless another process has
 * just done so.  `counted_at' is the time of the increment, plus the jitter.
 */
static void
schedule_counter(SharedBuffer *buffer, CounterRef ref, ClockTime counted_at)
{
	ClockTime	due_at = counted_at + registry_interval(buffer);
	uint64		none = 0;

	if (!pg_atomic_compare_exchange_u64(&ref.counter->counted_at, &none,
										(uint64) counted_at))
		return;
	if (counter_link(ref.counter))
		push(buffer, ref, due_at);
	else if (schedule_lower(&buffer->schedule, due_at))
		registry_wake(buffer);
}

/*
 * Get `counted_at' for a key that is first counted now: the time plus the
 * jitter.
 */
static ClockTime
count_time(SharedBuffer *buffer, ClockTime now)
{
	uint64		jitter = pg_atomic_read_u64(&buffer->settings.jitter);

	if (jitter > 0)
		now += pg_prng_uint64_range(&pg_global_prng_state, 0, jitter);
	return now;
}

/*
 * Add to a pinned counter, schedule it if it was idle, and unpin it.  If its
 * count becomes large, request an early flush.  `now' must be 0 in the first
 * of a series of calls; it is set when the time is needed, which it is not for
 * counters that are already scheduled.
 *
 * Takes no lock, cannot fail.  The lock that goes with a large delta is
 * released with the transaction's other locks, later, or by
 * counters_end_turn().
 */
void
counters_add(SharedBuffer *buffer, CounterPin *pin, int64 delta,
			 ClockTime *now)
{
	SharedCounter *counter = pin->ref.counter;

	/* the order matters: the worker sets the time to 0, then takes the count */
	pg_atomic_fetch_add_u64(&counter->count, (uint64) delta);
	if (pg_atomic_read_u64(&counter->counted_at) == 0)
	{
		if (*now == 0)
			*now = clock_now();
		schedule_counter(buffer, pin->ref, count_time(buffer, *now));
	}
	flush_if_large(buffer, counter);
	release_pin(pin);
}

/* Likewise, for a saved count that was counted at `counted_at'. */
void
counters_add_loaded(SharedBuffer *buffer, CounterPin *pin, int64 delta,
					ClockTime counted_at)
{
	SharedCounter *counter = pin->ref.counter;

	pg_atomic_fetch_add_u64(&counter->count, (uint64) delta);
	if (pg_atomic_read_u64(&counter->counted_at) == 0)
		schedule_counter(buffer, pin->ref, counted_at);
	flush_if_large(buffer, counter);
	release_pin(pin);
}

/*
 * Create counters for saved counts, and schedule them.  Returns how many of
 * them, from the first one on, were created: not those that the buffer holds
 * already, that are not moderate, or for which there is no room.  The others,
 * counters_pin_held() and counters_add_loaded() take one by one.
 *
 * `items' has room for `n'.  `nallocated' is set to the number of those with a
 * counter: those after the ones that were created, the caller frees with
 * table_free_many(), when it has noted which are loaded.
 *
 * The caller has claimed the buffer, so it may put them into the wheel, where
 * the worker would otherwise put each when it is no longer in the cache.  On
 * error, none is created.
 */
int
counters_create_loaded(SharedBuffer *buffer, const CounterTable *table,
					   const LoadedCount *loaded, int n, HashItem *items,
					   int *nallocated)
{
	SharedSchedule *schedule = &buffer->schedule;
	ClockTime	first = SCHEDULE_NEVER;
	uint64		sum = 0;
	int			ncreated = 0;
	int			moderate = 0;

	*nallocated = 0;

	Assert(registry_is_mine(buffer) && n <= HASH_MANY);
	for (; moderate < n &&
		 count_is_within(loaded[moderate].count, MODERATE_DELTA); moderate++)
		items[moderate].key = loaded[moderate].key;
	if (moderate == 0)
		return 0;
	schedule_prepare_to_add(schedule);
	*nallocated = table_allocate_many(&buffer->table, table, items, moderate, 0);
	for (int i = 0; i < *nallocated; i++)
	{
		SharedCounter *counter = items[i].ref.counter;

		/* the caller needs no pin */
		pg_atomic_init_u64(&counter->count, (uint64) loaded[i].count);
		pg_atomic_init_u64(&counter->counted_at, (uint64) loaded[i].counted_at);
		pg_atomic_init_u32(&counter->pins, COUNTER_LINKED);
	}
	if (*nallocated > 0)
		ncreated = table_insert_many(&buffer->table, table, items, *nallocated);
	if (ncreated < 0)
	{
		*nallocated = 0;
		return 0;
	}

	/* from here on nothing can fail */
	for (int i = 0; i < ncreated; i++)
	{
		schedule_add(schedule, items[i].ref);
		first = Min(first, loaded[i].counted_at);
		sum += (uint64) loaded[i].count;
	}
	if (ncreated > 0)
	{
		registry_count(buffer, STAT_PUBLISHED, sum);
		if (schedule_lower(schedule, first + registry_interval(buffer)))
			registry_wake(buffer);
	}
	return ncreated;
}

/*
 * Ask the worker to flush a key.  Does nothing if the buffer does not hold the
 * key.  May raise an error.  The caller wakes the worker.
 */
void
counters_request_flush(SharedBuffer *buffer, const CounterTable *table,
					   const KeyBytes *key)
{
	dsa_pointer request = requests_allocate_flush();
	CounterRef	ref = {NULL, InvalidDsaPointer};

	/* if memory is out, flushing everything helps */
	if (!DsaPointerIsValid(request))
	{
		requests_ask(&buffer->requests, REQUEST_FLUSH_ALL);
		return;
	}

	/* what nobody frees would keep its space from being removed */
	PG_TRY();
	{
		ref = table_pin(table, key);
	}
	PG_CATCH();
	{
		LWLockReleaseAll();
		space_free(request);
		PG_RE_THROW();
	}
	PG_END_TRY();
	if (ref.counter != NULL)
		requests_flush_key(&buffer->requests, request, ref);
	else
		space_free(request);
}

/* ------------------------------------------------------------------------
 * Moving
 * ------------------------------------------------------------------------
 */

/*
 * Add a count that was counted at `counted_at' to a counter, and schedule it, by
 * the earlier of this time and its own, unless it fails.
 */
static void
add_moved(SharedBuffer *buffer, CounterRef ref, int64 count,
		  ClockTime counted_at)
{
	SharedCounter *counter = ref.counter;
	uint64		at = pg_atomic_read_u64(&counter->counted_at);

	if (count == 0)
		return;
	pg_atomic_fetch_add_u64(&counter->count, (uint64) count);
	schedule_counter(buffer, ref, counted_at);
	while (counter->failures == 0 && at > (uint64) counted_at &&
		   !pg_atomic_compare_exchange_u64(&counter->counted_at, &at,
										   (uint64) counted_at))
		;
	flush_if_large(buffer, counter);
}

/*
 * Move the count of a key to another one.  Both are pinned, and stay so; the pin
 * of the other one was made for this count.  Nothing is in flight of the first
 * one, and nobody adds to it but a process that loads saved counts.
 *
 * The caller is the buffer's worker, or holds AccessExclusiveLock.  Takes no
 * lock, cannot fail.  Asks for REQUEST_MOVED.
 */
void
counters_move(SharedBuffer *buffer, CounterRef from, CounterRef to,
			  MovedCount *moved)
{
	uint64		at = pg_atomic_read_u64(&from.counter->counted_at);

	Assert(pg_atomic_read_u64(&from.counter->in_flight) == 0);

	/* if it fails, this is the time of the next attempt */
	moved->counted_at = (ClockTime) at;
	if (from.counter->failures > 0 || at == 0)
		moved->counted_at = Max(clock_now() - registry_interval(buffer), 1);
	pg_atomic_write_u64(&from.counter->counted_at, 0);
	moved->count = (int64) pg_atomic_exchange_u64(&from.counter->count, 0);
	table_clear_failure(&buffer->table, from.counter);
	add_moved(buffer, to, moved->count, moved->counted_at);
	requests_ask(&buffer->requests, REQUEST_MOVED);
}

/*
 * Undo counters_move(), under the same conditions, before anybody has flushed
 * the other key.
 */
void
counters_move_back(SharedBuffer *buffer, CounterRef from, CounterRef to,
				   const MovedCount *moved)
{
	pg_atomic_fetch_sub_u64(&to.counter->count, (uint64) moved->count);
	add_moved(buffer, from, moved->count, moved->counted_at);
	requests_ask(&buffer->requests, REQUEST_MOVED);
}

/* ------------------------------------------------------------------------
 * Clearing
 * ------------------------------------------------------------------------
 */

/*
 * Pin every counter of a buffer, for TRUNCATE.  Sets `pins' to an array in the
 * current memory context, and `npins' to the number of those that are pinned.
 * They are right at each moment, so that the caller's transaction can release
 * the pins if this raises an error: if memory is out, or if the transaction is
 * cancelled.
 *
 * The caller holds AccessExclusiveLock on the relation, and all saved counts
 * are loaded, so no process adds keys or takes counts.
 */
void
counters_pin_all(const CounterTable *table, CounterPin **pins, int *npins)
{
	TableScan	scan;
	CounterRef	ref;
	int			size = 0;

	*npins = 0;
	table_begin_scan(&scan, table, false);
	while (table_begin_portion(&scan))
	{
		while (table_next(&scan).counter != NULL)
			size++;
		CHECK_FOR_INTERRUPTS();
	}

	*pins = MemoryContextAllocHuge(CurrentMemoryContext,
								   Max(size, 1) * sizeof(CounterPin));
	table_begin_scan(&scan, table, false);
	while (table_begin_portion(&scan))
	{
		while ((ref = table_next(&scan)).counter != NULL)
		{
			if (*npins == size)
				elog(ERROR, "keys were added to a buffer that is being truncated");
			counter_pin(ref.counter);
			(*pins)[*npins].ref = ref;
			(*pins)[*npins].locked = false;
			(*npins)++;
		}
		CHECK_FOR_INTERRUPTS();
	}
}

/*
 * Clear a pinned counter's count, and unpin it.  Called after commit under
 * AccessExclusiveLock, which keeps the worker from flushing: takes no lock,
 * cannot fail.  The caller asks for REQUEST_SORT_AGAIN.
 */
void
counters_clear(SharedBuffer *buffer, CounterPin *pin)
{
	SharedCounter *counter = pin->ref.counter;
	uint64		count = pg_atomic_exchange_u64(&counter->count, 0);

	registry_count(buffer, STAT_PUBLISHED, -count);
	pg_atomic_write_u64(&counter->counted_at, 0);
	table_clear_failure(&buffer->table, counter);
	release_pin(pin);
}

/*
 * Wait until a counter is not pinned.  The caller has claimed the buffer and
 * closed the registry.  Returns false if that takes too long.  Also drops
 * requests: they hold pins, and a committing transaction may still make some.
 *
 * The caller holds no lock: the process with the pin may need that of the
 * partition.
 */
bool
counters_wait_unpinned(SharedBuffer *buffer, SharedCounter *counter,
					   ClockTime until)
{
	for (;;)
	{
		requests_drop_flushes(&buffer->requests);
		if (!counter_has_flag(counter, COUNTER_PINS))
			return true;
		if (clock_now() >= until)
			return false;
		pg_usleep(1000);
	}
}
