/*-------------------------------------------------------------------------
 *
 * counters.c
 *	  The shared counters: find or make, pin, add, clear, reap.
 *
 * Each buffer has a dshash table whose entries only point to the counters.
 * That keeps a counter as small as its key allows, and gives it an address
 * that other processes understand, which dshash does not tell of its entries.
 *
 * A count is changed in three ways.  A committing transaction pins its
 * counters where failing is still allowed, and adds through the pins once it
 * has committed, where it is not.  The worker takes the counts of a batch,
 * and settles them or gives them back: see batch.c.  TRUNCATE clears counts
 * through pins, when it commits.  All of this is atomic operations; the locks
 * of the table's partitions protect only which counters there are.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "common/int.h"
#include "compat.h"
#include "counters.h"
#include "miscadmin.h"
#include "postmaster/postmaster.h"
#include "shared.h"
#include "statbuffer.h"
#include "storage/lock.h"
#include "storage/lmgr.h"
#include "utils/memutils.h"

StaticAssertDecl(MAX_BACKENDS < MODERATE_COUNT / MODERATE_DELTA / 2,
				 "moderate deltas of all backends must fit");
StaticAssertDecl(MAX_BACKENDS < COUNTER_PINS,
				 "pins of all backends must fit");

/* An entry of a buffer's table. */
typedef struct TableEntry
{
	dsa_pointer counter;		/* InvalidDsaPointer: the key searched for */
} TableEntry;

/* who frees so many keys at once gives empty blocks back to the system */
#define TRIM_MIN_KEYS		1000

#define COUNTER_SIZE(keylen) \
	(offsetof(SharedCounter, key) + KEY_LENGTH(keylen))

/*
 * What a key costs: the entry with dshash's header, its share of the table's
 * buckets, of which there are 1.3 to 2.7 a key, and the counter, for which
 * dsa.c has sizes of 16 bytes more each (or somewhat coarser).
 */
#define KEY_COST(keylen) \
	(MAXALIGN(sizeof(TableEntry)) + 16 + 2 * sizeof(dsa_pointer) + \
	 TYPEALIGN(16, COUNTER_SIZE(keylen)))

/* The key searched for; entries without a counter compare as this one. */
static const KeyBytes *searched = NULL;
static uint8 searched_shape;

/* ------------------------------------------------------------------------
 * Tables
 * ------------------------------------------------------------------------
 */

static int
compare_entries(const void *a, const void *b, size_t size, void *arg)
{
	dsa_pointer pa = ((const TableEntry *) a)->counter;
	dsa_pointer pb = ((const TableEntry *) b)->counter;
	SharedCounter *counter;

	/* dshash only ever compares the key searched for with an entry */
	Assert(DsaPointerIsValid(pa) != DsaPointerIsValid(pb));
	counter = counter_at(DsaPointerIsValid(pa) ? pa : pb);

	if (counter->keylen != searched->len || counter->shape != searched_shape)
		return 1;
	return memcmp(counter->key, searched->data, KEY_LENGTH(searched->len));
}

static dshash_hash
hash_entry(const void *entry, size_t size, void *arg)
{
	Assert(!DsaPointerIsValid(((const TableEntry *) entry)->counter));
	return searched->hash;
}

static dshash_parameters
table_parameters(void)
{
	dshash_parameters params = {
		.key_size = sizeof(TableEntry),
		.entry_size = sizeof(TableEntry),
		.compare_function = compare_entries,
		.hash_function = hash_entry,
		COMPAT_DSHASH_COPY_MEMCPY
		.tranche_id = shared_control->tranche_counters
	};

	return params;
}

/* Make an empty table.  Raises an error when memory is out. */
dshash_table *
counters_create_table(void)
{
	dshash_parameters params = table_parameters();
	MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	dshash_table *table = dshash_create(shared_area, &params, NULL);

	MemoryContextSwitchTo(oldcontext);
	return table;
}

/*
 * Attach to the table of a buffer, unless that is done.  Leaves the shape to
 * the caller.
 */
void
counters_attach_table(SharedBuffer *buffer, CounterTable *table)
{
	dshash_parameters params;
	MemoryContext oldcontext;

	if (table->dshash != NULL)
	{
		if (table->number == buffer->table_number)
			return;
		dshash_detach(table->dshash);
		table->dshash = NULL;
	}
	params = table_parameters();
	oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	table->number = buffer->table_number;
	table->dshash = dshash_attach(shared_area, &params, buffer->table, NULL);
	MemoryContextSwitchTo(oldcontext);
}

/*
 * Give empty blocks back to the system, after much was freed.  The launcher,
 * which may sleep for long, has to unmap them, too.
 */
static void
trim(void)
{
	dsa_trim(shared_area);
	shared_wake_launcher();
}

/* Find a key and lock its partition; NULL, and no lock, when it isn't there */
static TableEntry *
find_entry(const CounterTable *table, const KeyBytes *key)
{
	TableEntry	probe = {InvalidDsaPointer};

	searched = key;
	searched_shape = table->shape;
	return dshash_find(table->dshash, &probe, false);
}

/* ------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------
 */

/* Read both parts of a count as they stood at one moment. */
static void
counters_read(SharedCounter *counter, int64 *count, int64 *in_flight)
{
	volatile uint16 *version = &counter->version;

	for (;;)
	{
		uint16		before = *version;

		pg_read_barrier();
		*count = (int64) pg_atomic_read_u64(&counter->count);
		*in_flight = (int64) pg_atomic_read_u64(&counter->in_flight);
		pg_read_barrier();
		if (likely((before & 1) == 0 && before == *version))
			return;
		SPIN_DELAY();
	}
}

/*
 * What was counted for a key and is not stored yet.  False when the buffer
 * does not hold the key.
 */
bool
counters_lookup(const CounterTable *table, const KeyBytes *key, int64 *count)
{
	TableEntry *entry = find_entry(table, key);
	int64		in_flight;

	if (entry == NULL)
		return false;
	counters_read(counter_at(entry->counter), count, &in_flight);
	dshash_release_lock(table->dshash, entry);

	/* counters_pin() keeps the sum in range */
	*count += in_flight;
	return true;
}

/*
 * Call the visitor for every key that can be read under the table's shape.  It
 * is called under a partition lock and, for the errors, SharedBuffer.lock.
 */
void
counters_scan(SharedBuffer *buffer, const CounterTable *table,
			  CounterVisitor visit, void *arg)
{
	dshash_seq_status status;
	TableEntry *entry;

	dshash_seq_init(&status, table->dshash, false);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		SharedCounter *counter = counter_at(entry->counter);
		CounterInfo info;

		if (!counter_is_readable(table, counter))
			continue;
		info.key = counter->key;
		info.keylen = counter->keylen;
		info.counted_at = (ClockTime) pg_atomic_read_u64(&counter->counted_at);
		counters_read(counter, &info.count, &info.in_flight);
		info.failures = counter->failures;
		info.error = NULL;
		if (info.failures == 0)
			visit(&info, arg);
		else
		{
			LWLockAcquire(&buffer->lock, LW_SHARED);
			if (DsaPointerIsValid(counter->error))
				info.error = ((SharedError *)
							  dsa_get_address(shared_area,
											  counter->error))->message;
			visit(&info, arg);
			LWLockRelease(&buffer->lock);
		}
	}
	dshash_seq_term(&status);
}

/*
 * How many keys have something that is not stored, of whatever shape, and the
 * sum of it.  As with the statistics, the sum may wrap.
 */
void
counters_sum(const CounterTable *table, uint64 *nkeys, int64 *sum)
{
	dshash_seq_status status;
	TableEntry *entry;
	uint64		total = 0;

	*nkeys = 0;
	dshash_seq_init(&status, table->dshash, false);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		int64		count,
					in_flight;

		counters_read(counter_at(entry->counter), &count, &in_flight);
		total += (uint64) count + (uint64) in_flight;
		if (count != 0 || in_flight != 0)
			(*nkeys)++;
	}
	dshash_seq_term(&status);
	*sum = (int64) total;
}

/* ------------------------------------------------------------------------
 * Adding
 * ------------------------------------------------------------------------
 */

/*
 * Keys may take so much of statbuffer.max_memory, and are flushed early from
 * so much on.  The rest is for a table's new buckets while it has the old
 * ones, for the registry, and for what allocation leaves over.
 *
 * It is ours to refuse a key before dsa.c does, which costs memory: it loses
 * the descriptor of the block that it could not get, and with it a segment
 * that could be given back.
 */
#define KEY_MEMORY_EIGHTHS		7
#define CROWDED_EIGHTHS			5

static inline uint64
memory_eighths(int eighths)
{
	return (uint64) statbuffer_max_memory * 1024 / 8 * eighths;
}

/* Do the keys take so much memory that they are to be flushed early? */
bool
counters_are_crowded(void)
{
	return pg_atomic_read_u64(&shared_control->nbytes) >
		memory_eighths(CROWDED_EIGHTHS);
}

/*
 * Is there room for so many new keys, with stored forms of so many bytes, as
 * far as can be told now?
 */
bool
counters_have_room(uint64 nkeys, uint64 size)
{
	return shared_control != NULL &&
		pg_atomic_read_u64(&shared_control->nbytes) +
		nkeys * (KEY_COST(0) + 16) + size <= memory_eighths(KEY_MEMORY_EIGHTHS);
}

static void
report_crowded(void)
{
	if (pg_atomic_exchange_u32(&shared_control->crowded, 1) == 0)
		shared_wake_launcher();
}

/* Raise the error that memory for keys is out. */
void
counters_report_out_of_memory(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg("out of memory for statbuffer keys"),
			 errdetail("All that \"%s\" allows is in use.",
					   "statbuffer.max_memory"),
			 errhint("Raise \"%s\", or find out with the view \"%s\" which buffer holds that much and whether it can be flushed.",
					 "statbuffer.max_memory", "sb_stat_buffers")));
}

/* A key has come, or gone. */
static void
account(SharedBuffer *buffer, uint16 keylen, int sign)
{
	int64		size = sign * (int64) KEY_COST(keylen);

	pg_atomic_fetch_add_u64(&buffer->nkeys, sign);
	pg_atomic_fetch_add_u64(&buffer->nbytes, size);
	pg_atomic_fetch_add_u64(&shared_control->nbytes, size);
}

/* Make a counter for a key that was not there, and pin it. */
static void
create_counter(SharedBuffer *buffer, const CounterTable *table,
			   const KeyBytes *key, CounterPin *pin)
{
	dsa_pointer volatile self = InvalidDsaPointer;
	SharedCounter *counter;
	TableEntry	probe = {InvalidDsaPointer};
	TableEntry *entry;
	bool		found;

	if (pg_atomic_read_u64(&shared_control->nbytes) + KEY_COST(key->len) >
		memory_eighths(KEY_MEMORY_EIGHTHS))
	{
		report_crowded();
		counters_report_out_of_memory();
	}

	PG_TRY();
	{
		self = dsa_allocate(shared_area, COUNTER_SIZE(key->len));
		counter = counter_at(self);
		searched = key;
		searched_shape = table->shape;
		entry = dshash_find_or_insert(table->dshash, &probe, &found);
	}
	PG_CATCH();
	{
		ErrorData  *edata;
		MemoryContext oldcontext = MemoryContextSwitchTo(TopTransactionContext);

		/* a lock that may still be held goes away with the transaction */
		edata = CopyErrorData();
		FlushErrorState();
		MemoryContextSwitchTo(oldcontext);
		if (DsaPointerIsValid(self))
			dsa_free(shared_area, self);

		/* what dsa.c says when it meets the bound; else it is the system's */
		report_crowded();
		if (edata->sqlerrcode == ERRCODE_OUT_OF_MEMORY &&
			strcmp(edata->message, _("out of memory")) == 0)
			counters_report_out_of_memory();
		if (edata->hint == NULL)
			edata->hint = pstrdup("Counts are kept in dynamic shared memory, of which the system has less than the setting \"statbuffer.max_memory\" allows.");
		ReThrowError(edata);
	}
	PG_END_TRY();

	if (!found)
	{
		pg_atomic_init_u64(&counter->count, 0);
		pg_atomic_init_u64(&counter->in_flight, 0);
		pg_atomic_init_u64(&counter->counted_at, 0);
		counter->next = 0;
		counter->error = InvalidDsaPointer;
		pg_atomic_init_u32(&counter->pins, 1);
		counter->version = 0;
		counter->failures = 0;
		counter->keylen = key->len;
		counter->shape = table->shape;
		counter->slot = 0;
		memcpy(counter->key, key->data, KEY_LENGTH(key->len));
		entry->counter = self;
		account(buffer, key->len, 1);
		pin->counter = counter;
		pin->self = self;
	}
	else
	{
		/* somebody else was faster */
		pin->self = entry->counter;
		pin->counter = counter_at(pin->self);
		pg_atomic_fetch_add_u32(&pin->counter->pins, 1);
	}
	dshash_release_lock(table->dshash, entry);

	if (found)
		dsa_free(shared_area, self);
	else if (unlikely(counters_are_crowded()))
		report_crowded();
}

static void
find_or_create(SharedBuffer *buffer, const CounterTable *table,
			   const KeyBytes *key, CounterPin *pin)
{
	TableEntry *entry = find_entry(table, key);

	if (entry != NULL)
	{
		pin->self = entry->counter;
		pin->counter = counter_at(pin->self);
		pg_atomic_fetch_add_u32(&pin->counter->pins, 1);
		dshash_release_lock(table->dshash, entry);
	}
	else
		create_counter(buffer, table, key, pin);
}

/* Are the counts being saved?  To be asked when the counters are pinned. */
static inline bool
is_closed(void)
{
	return pg_atomic_read_u32(&shared_control->closed) != 0;
}

/*
 * After counters are pinned and before anything is added to them: raise an
 * error when the counts are being saved, because the server stops.  The pins
 * stay, for the caller's transaction to let go of.
 */
void
counters_check_open(void)
{
	if (unlikely(is_closed()))
		ereport(ERROR,
				(errcode(ERRCODE_ADMIN_SHUTDOWN),
				 errmsg("cannot count because the server is shutting down"),
				 errdetail("The counts that statbuffer holds are being saved.")));
}

/*
 * The lock that large changes to a buffer's counts take turns on: ours in
 * the space of advisory locks, where SQL can't reach field 4's value.
 */
static void
set_large_tag(LOCKTAG *tag, SharedBuffer *buffer)
{
	SET_LOCKTAG_ADVISORY(*tag, buffer->key.dboid, buffer->key.relid, 0, 3);
}

/* Link a counter that was just given a due time, unless it is linked. */
static void
link_counter(SharedBuffer *buffer, SharedCounter *counter, dsa_pointer self,
			 ClockTime due_at)
{
	uint32		pins = pg_atomic_fetch_or_u32(&counter->pins, COUNTER_LINKED);

	if ((pins & COUNTER_LINKED) == 0)
		schedule_push(buffer, counter, self);
	schedule_wake(buffer, due_at);
}

static inline void
release_pin(CounterPin *pin)
{
	pg_atomic_fetch_sub_u32(&pin->counter->pins, 1);
	pin->counter = NULL;
}

/*
 * Let go of a pinned counter without adding to it.  Takes no lock, cannot
 * fail.
 */
void
counters_unpin(SharedBuffer *buffer, CounterPin *pin)
{
	SharedCounter *counter = pin->counter;

	if (counter == NULL)
		return;

	/*
	 * A counter that nothing was ever added to is on no list, and its worker
	 * does not know of it.  (One that was emptied has a time there.)  Link it
	 * without a time, so that the worker finds it to be idle.
	 */
	if (counter->next == 0 &&
		pg_atomic_read_u64(&counter->counted_at) == 0 &&
		(pg_atomic_fetch_or_u32(&counter->pins, COUNTER_LINKED) &
		 COUNTER_LINKED) == 0)
	{
		schedule_push(buffer, counter, pin->self);
		schedule_wake(buffer, clock_now());
	}

	release_pin(pin);
}

/*
 * Can `delta' be added, whatever the moderate deltas are that others may have
 * checked and not added yet?  A large one must not take the count beyond
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

/* A delta does not fit. */
static void
report_no_room(int64 held, int64 delta)
{
	/* those who may not read counts have only moderate deltas */
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
 * Find or make the counter of a key and hold it, having made sure that
 * `delta' can be added to it, and if that is large, that it takes the count to
 * `most' at most.  What can fail, fails here.
 *
 * The caller calls counters_add(), and counters_schedule() when that says so,
 * or counters_unpin(), whatever happens.  On error nothing is pinned.
 *
 * A moderate delta that finds a moderate count need not know what others are
 * about to add: deltas like it, of all backends together, are less than
 * MODERATE_COUNT / 2, and at most one large one, which is no more than
 * LARGE_COUNT.  All others take turns: they hold a lock from before the check
 * until the transaction ends.  So large increments wait for each other, and
 * moderate ones only when the count is already beyond what is moderate.
 */
void
counters_pin(SharedBuffer *buffer, const CounterTable *table, const KeyBytes *key,
			 int64 delta, int64 most, CounterPin *pin)
{
	bool		moderate = count_is_within(delta, MODERATE_DELTA);
	uint32		others;
	int64		count,
				in_flight;

	/* a new counter that is released has the worker look at it: lock first */
	for (bool locked = !moderate;; locked = true)
	{
		if (unlikely(locked))
		{
			LOCKTAG		tag;

			set_large_tag(&tag, buffer);
			(void) LockAcquire(&tag, ExclusiveLock, false, false);
		}
		find_or_create(buffer, table, key, pin);
		pin->locked = locked;

		/* the pin, an atomic operation, came before these */
		counters_read(pin->counter, &count, &in_flight);
		if (likely(moderate &&
				   count_is_within(count, MODERATE_COUNT) &&
				   count_is_within(count + in_flight, MODERATE_COUNT)))
			return;
		if (locked)
			break;

		counters_unpin(buffer, pin);
	}

	/* what is in flight may come back, or not */
	others = (pg_atomic_read_u32(&pin->counter->pins) & COUNTER_PINS) - 1;
	counters_read(pin->counter, &count, &in_flight);
	if (!fits(count, delta, most, others) ||
		!fits(count + in_flight, delta, most, others))
	{
		counters_unpin(buffer, pin);
		report_no_room(count + in_flight, delta);
	}
}

/*
 * Much is counted for a scheduled key: have it flushed before it is due, so
 * that there is room for others' increments.  That does not help a key that
 * cannot be flushed.
 */
static inline void
flush_if_urgent(SharedBuffer *buffer, SharedCounter *counter)
{
	if (unlikely(!count_is_within((int64) pg_atomic_read_u64(&counter->count),
								  LARGE_COUNT)) &&
		counter->failures == 0 &&
		pg_atomic_exchange_u32(&buffer->relieve, 1) == 0)
		schedule_poke(buffer);
}

/*
 * Add to a pinned counter, and unpin it if it is scheduled.  If it isn't,
 * returns false, and counters_schedule() must be called next.  When much is
 * counted, the buffer is asked to flush early.
 *
 * Takes no lock, cannot fail.  The lock that goes with a large delta is
 * released with the transaction's other locks, later, or by
 * counters_end_turn().
 */
bool
counters_add(SharedBuffer *buffer, CounterPin *pin, int64 delta)
{
	pg_atomic_fetch_add_u64(&pin->counter->count, (uint64) delta);
	if (pg_atomic_read_u64(&pin->counter->counted_at) == 0)
		return false;
	flush_if_urgent(buffer, pin->counter);
	release_pin(pin);
	return true;
}

/*
 * Schedule a pinned counter that something was added to, unless somebody else
 * just did, and unpin it.  `counted_at' is now, with the jitter, and `due_at'
 * an interval later.  Takes no lock, cannot fail.
 */
void
counters_schedule(SharedBuffer *buffer, CounterPin *pin,
				  ClockTime counted_at, ClockTime due_at)
{
	uint64		none = 0;

	if (pg_atomic_compare_exchange_u64(&pin->counter->counted_at, &none,
									   (uint64) counted_at))
		link_counter(buffer, pin->counter, pin->self, due_at);
	flush_if_urgent(buffer, pin->counter);
	release_pin(pin);
}

/*
 * As counters_pin(), for what is added at once.  Also raises the error of
 * counters_check_open(); on error nothing is pinned.
 */
void
counters_pin_now(SharedBuffer *buffer, const CounterTable *table,
				 const KeyBytes *key, int64 delta, CounterPin *pin)
{
	counters_pin(buffer, table, key, delta, LARGE_COUNT, pin);
	if (unlikely(is_closed()))
	{
		counters_unpin(buffer, pin);
		counters_check_open();
	}
}

/*
 * A large delta was added before the transaction's end: it is in the count,
 * and nobody has to wait for it any more.
 */
void
counters_end_turn(SharedBuffer *buffer)
{
	LOCKTAG		tag;

	set_large_tag(&tag, buffer);
	LockRelease(&tag, ExclusiveLock, false);
}

/*
 * Pin every counter of a buffer, for TRUNCATE.  Returns an array in the
 * current memory context.
 *
 * The caller holds AccessExclusiveLock on the relation, and nothing that was
 * saved is still to be loaded, so that nobody adds keys and the worker takes
 * nothing; that also makes room for no failure between here and the return,
 * as the array has to be there when the pins are.
 */
CounterPin *
counters_pin_all(const CounterTable *table, int *npins)
{
	dshash_seq_status status;
	TableEntry *entry;
	CounterPin *pins;
	int			size = 0;
	int			n = 0;

	/* first count, then pin: nobody adds keys meanwhile */
	dshash_seq_init(&status, table->dshash, false);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		(void) counter_at(entry->counter);
		size++;
	}
	dshash_seq_term(&status);

	pins = MemoryContextAllocHuge(CurrentMemoryContext,
								  Max(size, 1) * sizeof(CounterPin));
	dshash_seq_init(&status, table->dshash, false);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		if (n == size)
			elog(ERROR, "keys were added to a buffer that is being truncated");
		pins[n].self = entry->counter;
		pins[n].counter = counter_at(entry->counter);
		pins[n].locked = false;
		pg_atomic_fetch_add_u32(&pins[n].counter->pins, 1);
		n++;
	}
	dshash_seq_term(&status);

	*npins = n;
	return pins;
}

/*
 * Forget a pinned counter's count, and unpin it.  Called after commit under
 * AccessExclusiveLock, which keeps the worker from flushing: takes no lock,
 * cannot fail.  The caller sets SharedBuffer.truncated.
 */
void
counters_clear(SharedBuffer *buffer, CounterPin *pin)
{
	SharedCounter *counter = pin->counter;
	uint64		count = pg_atomic_exchange_u64(&counter->count, 0);

	pg_atomic_fetch_add_u64(&buffer->stats[STAT_PUBLISHED], -count);
	pg_atomic_write_u64(&counter->counted_at, 0);
	counters_clear_failure(buffer, counter);
	release_pin(pin);
}

/* As schedule_push().  The worker unpins the counter. */
static void
push_request(SharedBuffer *buffer, SharedFlushRequest *request,
			 dsa_pointer pointer)
{
	uint64		head = pg_atomic_read_u64(&buffer->flush_requests);

	do
	{
		request->next = head;
	} while (!pg_atomic_compare_exchange_u64(&buffer->flush_requests, &head,
											 pointer));
}

/*
 * Ask the worker for a key's flush.  Nothing happens when the buffer does not
 * hold the key.  May raise an error.  The caller wakes the worker.
 */
void
counters_request_flush(SharedBuffer *buffer, const CounterTable *table,
					   const KeyBytes *key)
{
	TableEntry *entry;
	dsa_pointer pointer;
	SharedFlushRequest *request;
	SharedCounter *counter;
	bool		asked;

	/* where memory is out, flushing is just what is needed: flush all */
	pointer = dsa_allocate_extended(shared_area, sizeof(SharedFlushRequest),
									DSA_ALLOC_NO_OOM);
	if (!DsaPointerIsValid(pointer))
	{
		pg_atomic_write_u32(&buffer->flush_all, 1);
		return;
	}
	request = dsa_get_address(shared_area, pointer);

	entry = find_entry(table, key);
	if (entry == NULL)
	{
		dsa_free(shared_area, pointer);
		return;
	}
	request->counter = entry->counter;
	counter = counter_at(entry->counter);

	/* one request a key will do: the worker may be busy for long */
	asked = (pg_atomic_fetch_or_u32(&counter->pins, COUNTER_ASKED) &
			 COUNTER_ASKED) != 0;
	if (!asked)
		pg_atomic_fetch_add_u32(&counter->pins, 1);
	dshash_release_lock(table->dshash, entry);
	if (asked)
	{
		dsa_free(shared_area, pointer);
		return;
	}

	push_request(buffer, request, pointer);
}

/*
 * The same for a transaction that is about to publish, in three steps.  This
 * one allocates the request; InvalidDsaPointer when memory is out.  Whatever
 * becomes of the transaction, the others must follow.
 */
dsa_pointer
counters_prepare_request(const CounterPin *pin)
{
	dsa_pointer pointer;

	pointer = dsa_allocate_extended(shared_area, sizeof(SharedFlushRequest),
									DSA_ALLOC_NO_OOM);
	if (DsaPointerIsValid(pointer))
		((SharedFlushRequest *)
		 dsa_get_address(shared_area, pointer))->counter = pin->self;
	return pointer;
}

/* Before the counter is unpinned.  Cannot fail, as the next one. */
void
counters_pin_request(const CounterPin *pin)
{
	pg_atomic_fetch_add_u32(&pin->counter->pins, 1);
}

/*
 * When the counter is scheduled, if it is.  There may be other requests for
 * the key, as this one can't be freed here.  The caller wakes the worker.
 */
void
counters_make_request(SharedBuffer *buffer, dsa_pointer pointer)
{
	SharedFlushRequest *request = dsa_get_address(shared_area, pointer);

	pg_atomic_fetch_or_u32(&counter_at(request->counter)->pins, COUNTER_ASKED);
	push_request(buffer, request, pointer);
}

/* ------------------------------------------------------------------------
 * What follows is for the buffer's worker alone.
 * ------------------------------------------------------------------------
 */

/*
 * Point a counter to another error; frees the old one with its last key.
 * Takes SharedBuffer.lock.
 */
void
counters_replace_error(SharedBuffer *buffer, SharedCounter *counter,
					   dsa_pointer error)
{
	dsa_pointer old = counter->error;
	SharedError *old_error;

	if (old == error)
		return;
	old_error = dsa_get_address(shared_area, old);

	LWLockAcquire(&buffer->lock, LW_EXCLUSIVE);
	counter->error = error;
	if (DsaPointerIsValid(error))
		((SharedError *) dsa_get_address(shared_area, error))->nkeys++;
	if (old_error == NULL || --old_error->nkeys > 0)
		old = InvalidDsaPointer;
	LWLockRelease(&buffer->lock);

	if (DsaPointerIsValid(old))
		dsa_free(shared_area, old);
}

/*
 * Free the counters that are empty, unused, and were taken last before
 * `idle_before'.  Those that it leaves for now are noted anew.
 */
void
counters_reap(SharedBuffer *buffer, const CounterTable *table,
			  ClockTime idle_before)
{
	dshash_seq_status status;
	TableEntry *entry;
	uint64		nfreed = 0;

	buffer->nidle = 0;
	buffer->oldest_idle = SCHEDULE_NEVER;
	dshash_seq_init(&status, table->dshash, true);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		dsa_pointer self = entry->counter;
		SharedCounter *counter = counter_at(self);
		uint32		pins;

		/* who pins it does so under the partition's lock, which we have */
		pins = pg_atomic_read_u32(&counter->pins);
		if ((pins & COUNTER_LINKED) != 0 ||
			pg_atomic_read_u64(&counter->count) != 0 ||
			pg_atomic_read_u64(&counter->in_flight) != 0)
			continue;
		if (pins != 0 || (ClockTime) counter->next > idle_before)
		{
			shared_note_idle(buffer, (ClockTime) counter->next);
			continue;
		}

		counters_replace_error(buffer, counter, InvalidDsaPointer);
		account(buffer, counter->keylen, -1);
		dshash_delete_current(&status);
		dsa_free(shared_area, self);
		nfreed++;
	}
	dshash_seq_term(&status);
	if (nfreed >= TRIM_MIN_KEYS)
		trim();
}

/*
 * Put a new table in the place of an empty one, whose buckets dshash would
 * keep for as many keys as it ever held.  The caller holds AccessExclusiveLock
 * on the relation, and attaches anew.
 */
void
counters_replace_table(SharedBuffer *buffer)
{
	dshash_table *new_table = counters_create_table();
	CounterTable old_table = {.dshash = NULL};

	counters_attach_table(buffer, &old_table);
	Assert(pg_atomic_read_u64(&buffer->nkeys) == 0);
	buffer->table = dshash_get_hash_table_handle(new_table);
	buffer->table_number++;
	dshash_detach(new_table);
	dshash_destroy(old_table.dshash);
	trim();
}

/*
 * Remove the shapes that no key has any more, and the keys that nothing is
 * counted for.  The caller is the buffer's worker and holds
 * AccessExclusiveLock on the relation.  Looks at every key.
 */
void
counters_remove_shapes(SharedBuffer *buffer, ClockTime now)
{
	CounterTable table = {.dshash = NULL};
	uint32		used = 0;
	dshash_seq_status status;
	TableEntry *entry;

	counters_attach_table(buffer, &table);
	counters_reap(buffer, &table, now);
	dshash_seq_init(&status, table.dshash, false);
	while ((entry = dshash_seq_next(&status)) != NULL)
		used |= (uint32) 1 << counter_at(entry->counter)->shape;
	dshash_seq_term(&status);
	dshash_detach(table.dshash);
	shared_remove_shapes(buffer, used);
}

/* Forget what sb_flush() asked for. */
static void
drop_requests(SharedBuffer *buffer)
{
	dsa_pointer pointer;

	while (DsaPointerIsValid(pointer = buffer->flush_taken) ||
		   DsaPointerIsValid(pointer = pg_atomic_exchange_u64(&buffer->flush_requests,
															  InvalidDsaPointer)))
	{
		SharedFlushRequest *request = dsa_get_address(shared_area, pointer);
		SharedCounter *counter = counter_at(request->counter);

		buffer->flush_taken = request->next;
		pg_atomic_fetch_and_u32(&counter->pins, ~COUNTER_ASKED);
		pg_atomic_fetch_sub_u32(&counter->pins, 1);
		dsa_free(shared_area, pointer);
	}
}

/*
 * Wait until nobody holds a pin on any counter, now that SharedControl.closed
 * is set.  False when that takes too long.  Requests are forgotten: they hold
 * pins, and whoever commits may still make some.
 */
bool
counters_wait_unpinned(SharedBuffer *buffer, const CounterTable *table,
					   ClockTime until)
{
	bool		pinned;

	for (;;)
	{
		dshash_seq_status status;
		TableEntry *entry;

		drop_requests(buffer);
		pinned = false;
		dshash_seq_init(&status, table->dshash, false);
		while (!pinned && (entry = dshash_seq_next(&status)) != NULL)
			pinned = (pg_atomic_read_u32(&counter_at(entry->counter)->pins) &
					  COUNTER_PINS) != 0;
		dshash_seq_term(&status);

		/* who has one may need the partition's lock to get as far as the end */
		if (!pinned || clock_now() >= until)
			break;
		pg_usleep(1000);
	}
	return !pinned;
}

/*
 * Free all that there is of a buffer whose relation is gone, and tell the log
 * what was lost with it.  The caller has claimed the buffer; if it does not
 * end soon it wakes the launcher, for the reason that trim() does.
 */
void
counters_drop_buffer(SharedBuffer *buffer, bool with_database)
{
	SharedBufferKey key = buffer->key;
	uint64		nkeys = pg_atomic_read_u64(&buffer->nkeys);
	CounterTable table = {.dshash = NULL};
	dshash_seq_status status;
	TableEntry *entry;
	uint64		sum = 0;

	counters_attach_table(buffer, &table);
	drop_requests(buffer);
	dshash_seq_init(&status, table.dshash, true);
	while ((entry = dshash_seq_next(&status)) != NULL)
	{
		dsa_pointer self = entry->counter;
		SharedCounter *counter = counter_at(self);

		sum += pg_atomic_read_u64(&counter->count);
		counters_replace_error(buffer, counter, InvalidDsaPointer);
		account(buffer, counter->keylen, -1);
		dshash_delete_current(&status);
		dsa_free(shared_area, self);
	}
	dshash_seq_term(&status);
	shared_remove_shapes(buffer, 0);
	dshash_destroy(table.dshash);
	shared_remove_buffer(buffer);
	dsa_trim(shared_area);

	if (sum != 0)
		ereport(LOG,
				(with_database ?
				 errmsg("statbuffer dropped the counts of a database that does not exist any more") :
				 errmsg("statbuffer dropped the counts of a buffer that does not exist any more"),
				 errdetail_plural("Relation %u of database %u held a count of %lld in %llu key.",
								  "Relation %u of database %u held counts of %lld altogether in %llu keys.",
								  nkeys, key.relid, key.dboid,
								  (long long) sum, (unsigned long long) nkeys)));
}
