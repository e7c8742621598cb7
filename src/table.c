/*-------------------------------------------------------------------------
 *
 * table.c
 *	  A buffer's table of counters by key: create, find, read, scan.
 *
 * The locks of the hash table's partitions protect the set of counters.  Their
 * contents are changed by atomic operations, without these locks.
 *
 * This room also accounts for the memory that keys take, and keeps the
 * shapes of a buffer's keys.  hashtable.c is the table itself; no other file
 * calls it.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "compat.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "settings.h"
#include "table.h"
#include "utils/memutils.h"
#include "utils/resowner.h"

#define ST_SORT sort_pointers
#define ST_ELEMENT_TYPE dsa_pointer
#define ST_COMPARE(a, b) (*(a) < *(b) ? -1 : *(a) > *(b))
#define ST_SCOPE static
#define ST_DEFINE
#include "lib/sort_template.h"

#define COUNTER_SIZE(keylen) \
	(offsetof(SharedCounter, key) + KEY_LENGTH(keylen))

/*
 * The memory that a key uses: the counter, for which dsa.c has size classes in
 * steps of 16 bytes (or somewhat coarser), and its bucket.
 */
#define KEY_COST(keylen) \
	(TYPEALIGN(16, COUNTER_SIZE(keylen)) + sizeof(dsa_pointer))

/*
 * The share of statbuffer.max_memory that keys may use, and the share from
 * which on they are flushed early.  The rest is for the registry, and for what
 * allocation wastes.
 *
 * We must refuse a key before dsa.c does.  If dsa.c cannot get a block, it
 * leaks the block's descriptor, and with it a segment that could have been
 * returned.
 */
#define KEY_MEMORY_EIGHTHS		7
#define SHORT_MEMORY_EIGHTHS	5

/*
 * The same for a buffer's option "max_memory".  Keys may use all of it, because
 * it is for nothing else.
 */
#define SHORT_BUFFER_EIGHTHS	5

/*
 * Shapes are small and live long.  If they were allocated from the size
 * classes of most keys, each shape would keep a block from being returned when
 * the keys are gone.
 */
#define SHAPE_MIN_ALLOC			256

/* how many keys of a removed buffer are freed at a time */
#define CLEAR_KEYS				(256 * 1024)

/* the memory of so many counters ahead is fetched meanwhile */
#define FETCH_AHEAD				16

/*
 * The system may have less memory than statbuffer.max_memory allows, and dsa.c
 * may need more than we account for.  A process that could not create a key for
 * that reason does not try again for so long: each attempt leaks a little.
 */
#define REFUSED_MSECS			1000

/* and for so long, every new key may be one that there is no memory for */
#define EXHAUSTED_MSECS			10000

/* maximum size of the error text that is kept for a key */
#define ERROR_MAX_SIZE			256

/*
 * The last time that this process could not create a key though no bound was
 * reached (0: never, or that is over); why (TABLE_FULL: dsa.c's size limit,
 * TABLE_NO_MEMORY: the system); and what the system has said, in a memory context
 * of its own.
 */
static ClockTime refused_at = 0;
static TableResult refused_as = TABLE_FULL;
static ErrorData *refused_error = NULL;
static MemoryContext refused_context = NULL;

/* ------------------------------------------------------------------------
 * Making and attaching
 * ------------------------------------------------------------------------
 */

/* Create an empty table.  Raises an error if memory is out. */
dsa_pointer
table_create(void)
{
	dsa_pointer pointer = dsa_allocate(shared_area,
									   HASH_PARTITIONS * sizeof(HashPartition));

	hash_init(dsa_get_address(shared_area, pointer),
			  shared_control->tranches.counters);
	return pointer;
}

/*
 * Initialize the struct of a new buffer, with a table from table_create().
 * Cannot fail.
 */
void
table_init(SharedTable *shared, dsa_pointer partitions)
{
	shared->partitions = partitions;
	shared->number = pg_atomic_add_fetch_u64(&shared_control->last_table, 1);
	pg_atomic_init_u64(&shared->nkeys, 0);
	pg_atomic_init_u64(&shared->nbytes, 0);
	pg_atomic_init_u64(&shared->nremoved, 0);
	pg_atomic_init_u32(&shared->failing, 0);
	LWLockInitialize(&shared->lock, shared_control->tranches.table);
	for (int i = 0; i < TABLE_SHAPES; i++)
		shared->shapes[i] = InvalidDsaPointer;
	shared->shapes_number = 0;
	shared->last_error = InvalidDsaPointer;
	shared->removed = InvalidDsaPointer;
	shared->moved = 0;
}

/*
 * Attach to the table of a buffer, unless already attached.  Does not set the
 * shape: see table_find_shape().  Raises an error if memory cannot be mapped.
 */
void
table_attach(SharedTable *shared, CounterTable *table)
{
	if (table->partitions != NULL && table->number == shared->number)
		return;
	table->partitions = dsa_get_address(shared_area, shared->partitions);
	table->number = shared->number;
	table->last.counter = NULL;
}

/* Detach, if attached. */
void
table_detach(CounterTable *table)
{
	table->partitions = NULL;
}

/* ------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------
 */

/*
 * Get what is counted for a key, and what of it is in flight, which is not part
 * of the count.  Returns false if the buffer does not hold the key.  Locks a
 * partition of the table.
 */
bool
table_read(const CounterTable *table, const KeyBytes *key, int64 *count,
		   int64 *in_flight)
{
	LWLock	   *lock = hash_lock(table->partitions, key->hash, LW_SHARED);
	CounterRef	ref = hash_find(table->partitions, key, table->shape);

	if (ref.counter != NULL)
		counter_read(ref.counter, count, in_flight);
	LWLockRelease(lock);
	return ref.counter != NULL;
}

/*
 * Begin a scan of all keys, of any shape.  With `to_delete', partitions are
 * locked exclusively.
 *
 * The scan is a loop over portions, and within it, one over counters: the lock
 * of a partition is held only within a portion.
 */
void
table_begin_scan(TableScan *scan, const CounterTable *table, bool to_delete)
{
	hash_begin_scan(&scan->scan, table->partitions,
					to_delete ? LW_EXCLUSIVE : LW_SHARED);
}

/* Begin the next portion.  Returns false if there is none. */
bool
table_begin_portion(TableScan *scan)
{
	return hash_begin_portion(&scan->scan);
}

/*
 * Get the next counter of the portion, with the lock of its partition held.  At
 * the end of the portion, returns one with a NULL pointer, and has released the
 * lock.
 */
CounterRef
table_next(TableScan *scan)
{
	return hash_next(&scan->scan);
}

/*
 * Get the position of a scan between two portions, which is a number that goes
 * up: it has come by all keys for which table_position() is less, and no
 * others.
 */
uint64
table_scan_position(const TableScan *scan)
{
	return hash_scan_position(&scan->scan);
}

/* The position at which a scan comes by a key. */
uint64
table_position(const KeyBytes *key)
{
	return hash_position(key->hash);
}

/* End a scan in the middle of a portion. */
void
table_end_portion(TableScan *scan)
{
	hash_end_portion(&scan->scan);
}

/* Call the visitor for a key. */
static void
visit_counter(SharedTable *shared, SharedCounter *counter,
			  CounterVisitor visit, void *arg)
{
	CounterInfo info;

	info.key = counter->key;
	info.keylen = counter->keylen;
	info.shape = counter->shape;
	info.counted_at = (ClockTime) pg_atomic_read_u64(&counter->counted_at);
	counter_read(counter, &info.count, &info.in_flight);
	info.failures = counter->failures;
	info.error = NULL;
	if (info.failures == 0)
	{
		visit(&info, arg);
		return;
	}
	LWLockAcquire(&shared->lock, LW_SHARED);
	if (DsaPointerIsValid(counter->error))
		info.error = ((SharedError *) dsa_get_address(shared_area,
													  counter->error))->message;
	visit(&info, arg);
	LWLockRelease(&shared->lock);
}

/*
 * Call the visitor for every key of the next portion that can be read under
 * the table's shape.  It is called under a partition lock and, if there is an
 * error, SharedTable.lock.  Returns false if there is no portion any more.
 */
bool
table_visit_portion(SharedTable *shared, const CounterTable *table,
					TableScan *scan, CounterVisitor visit, void *arg)
{
	CounterRef	ref;

	if (!table_begin_portion(scan))
		return false;
	while ((ref = table_next(scan)).counter != NULL)
		if (table_can_read(table, ref.counter))
			visit_counter(shared, ref.counter, visit, arg);
	return true;
}

/* The same for all portions. */
void
table_visit(SharedTable *shared, const CounterTable *table,
			CounterVisitor visit, void *arg)
{
	TableScan	scan;

	table_begin_scan(&scan, table, false);
	while (table_visit_portion(shared, table, &scan, visit, arg))
		;
}

/*
 * Get the number of keys with a count that is not stored, of a set of shapes, and
 * the sum of these counts.  As with the statistics, the sum may wrap.
 */
void
table_sum(const CounterTable *table, uint32 shapes, uint64 *nkeys, int64 *sum)
{
	TableScan	scan;
	CounterRef	ref;
	uint64		total = 0;

	*nkeys = 0;
	table_begin_scan(&scan, table, false);
	while (table_begin_portion(&scan))
	{
		while ((ref = table_next(&scan)).counter != NULL)
		{
			int64		count,
						in_flight;

			if ((shapes & ((uint32) 1 << ref.counter->shape)) == 0)
				continue;
			counter_read(ref.counter, &count, &in_flight);
			total += (uint64) count + (uint64) in_flight;
			if (count != 0 || in_flight != 0)
				(*nkeys)++;
		}
		CHECK_FOR_INTERRUPTS();
	}
	*sum = (int64) total;
}

/* ------------------------------------------------------------------------
 * Memory
 * ------------------------------------------------------------------------
 */

static inline uint64
memory_eighths(int eighths)
{
	return (uint64) space_bound() / 8 * eighths;
}

/*
 * Do the keys of all buffers use so much memory that they must be flushed
 * early?  Takes no lock.
 */
bool
table_memory_is_short(void)
{
	return pg_atomic_read_u64(&shared_control->memory.nbytes) >
		memory_eighths(SHORT_MEMORY_EIGHTHS);
}

/*
 * Is there memory for `nkeys' new keys, whose stored forms have `size' bytes
 * in total, and would they fit within a buffer's bound (0: none)?  Takes no
 * lock, so the answer is only an estimate.
 */
bool
table_has_room(uint64 nkeys, uint64 size, uint64 max_memory)
{
	uint64		cost = nkeys * (KEY_COST(0) + 16) + size;

	return shared_control != NULL &&
		pg_atomic_read_u64(&shared_control->memory.nbytes) + cost <=
		memory_eighths(KEY_MEMORY_EIGHTHS) &&
		(max_memory == 0 || cost <= max_memory);
}

/* Ask the launcher to request early flushes. */
static void
report_short_memory(void)
{
	if (pg_atomic_exchange_u32(&shared_control->memory.short_of_memory, 1) == 0)
		launcher_slot_wake();
}

/*
 * Do the buffer's keys use so much of its own bound that they must be flushed
 * early?  Takes no lock.
 */
bool
table_is_short(SharedTable *shared, uint64 max_memory)
{
	return max_memory > 0 && pg_atomic_read_u64(&shared->nbytes) >
		max_memory / 8 * SHORT_BUFFER_EIGHTHS;
}

/*
 * Is there memory for a new key?  If not, returns which bound is reached, the
 * buffer's or that of all buffers.  Sessions that ask at the same moment can
 * exceed it by one key each, or by HASH_MANY where many are published at once.
 * `shared' is NULL if the buffer has no table yet.
 */
static inline TableResult
find_room(SharedTable *shared, uint64 max_memory, uint16 keylen)
{
	if (max_memory > 0 && shared != NULL &&
		pg_atomic_read_u64(&shared->nbytes) + KEY_COST(keylen) > max_memory)
		return TABLE_BUFFER_FULL;
	if (pg_atomic_read_u64(&shared_control->memory.nbytes) + KEY_COST(keylen) >
		memory_eighths(KEY_MEMORY_EIGHTHS))
		return TABLE_FULL;
	return TABLE_CREATED;
}

/* The same, including that memory was exhausted of late. */
bool
table_may_be_full(SharedTable *shared, uint64 max_memory, uint16 keylen)
{
	pg_atomic_uint64 *exhausted_at = &shared_control->memory.exhausted_at;
	uint64		last = pg_atomic_read_u64(exhausted_at);

	if (unlikely(last != 0))
	{
		if (!clock_passed((ClockTime) last, clock_now(), EXHAUSTED_MSECS))
			return true;
		pg_atomic_write_u64(exhausted_at, 0);
	}
	return find_room(shared, max_memory, keylen) != TABLE_CREATED;
}

/* In ereport(): which bound is reached. */
static int
errdetail_full(TableResult result)
{
	if (result == TABLE_BUFFER_FULL)
		return errdetail("All memory that the buffer's option \"%s\" allows is in use.",
						 "max_memory");
	if (result == TABLE_NO_MEMORY)
		return errdetail_internal("%s", refused_error->message);
	return errdetail("All memory that \"%s\" allows is in use.",
					 "statbuffer.max_memory");
}

/* In ereport(): what to do about it. */
static int
errhint_full(TableResult result)
{
	if (result == TABLE_BUFFER_FULL)
		return errhint("You might need to increase the option \"%s\" with ALTER FOREIGN TABLE. The view \"%s\" shows whether the buffer can be flushed.",
					   "max_memory", "sb_stat_buffers");
	if (result == TABLE_NO_MEMORY)
		return errhint("%s", refused_error->hint);
	return errhint("You might need to increase \"%s\". The view \"%s\" shows which buffer holds that much and whether it can be flushed.",
				   "statbuffer.max_memory", "sb_stat_buffers");
}

/*
 * Raise the error that a new key has found no room: what table_pin_or_create()
 * returned, and the buffer's name.
 */
void
table_report_full(TableResult result, const char *name)
{
	if (result == TABLE_NO_MEMORY)
		ReThrowError(refused_error);
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 result == TABLE_BUFFER_FULL ?
			 errmsg("out of memory for keys of buffer \"%s\"", name) :
			 errmsg("out of memory for statbuffer keys"),
			 errdetail_full(result),
			 errhint_full(result)));
}

/*
 * Warn, at `elevel', that new keys have found no room, and that their counts
 * are discarded.
 */
void
table_warn_full(int elevel, TableResult result, const char *name, uint64 nkeys)
{
	ereport(elevel,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg_plural("discarding the count of %llu new key of buffer \"%s\"",
						   "discarding the counts of %llu new keys of buffer \"%s\"",
						   nkeys, (unsigned long long) nkeys, name),
			 errdetail_full(result),
			 errhint_full(result)));
}

/* Account for keys that were created, or freed: then both are negative. */
static void
account(SharedTable *shared, int64 nkeys, int64 size)
{
	pg_atomic_fetch_add_u64(&shared->nkeys, nkeys);
	pg_atomic_fetch_add_u64(&shared->nbytes, size);
	pg_atomic_fetch_add_u64(&shared_control->memory.nbytes, size);
}

/* ------------------------------------------------------------------------
 * Finding and making counters
 * ------------------------------------------------------------------------
 */

/*
 * Is the counter that was pinned last still there, and that of a key?  The
 * partition of the key is locked.
 */
static inline bool
last_is(const CounterTable *table, const KeyBytes *key, uint64 nremoved)
{
	const SharedCounter *last = table->last.counter;

	return last != NULL && table->last_hash == key->hash &&
		table->nremoved == nremoved &&
		last->keylen == key->len && last->shape == table->shape &&
		memcmp(last->key, key->data, KEY_LENGTH(key->len)) == 0;
}

/*
 * Find the counter of a key and pin it.  If the buffer does not hold the key,
 * returns one with a NULL pointer; then notes what hash_prepare() is to allocate
 * for it.  Locks a partition of the table.
 */
static inline CounterRef
find_and_pin(SharedTable *shared, CounterTable *table, const KeyBytes *key,
			 HashSpare *spare)
{
	LWLock	   *lock = hash_lock(table->partitions, key->hash, LW_SHARED);
	uint64		nremoved = pg_atomic_read_u64(&shared->nremoved);
	CounterRef	ref;

	if (last_is(table, key, nremoved))
		ref = table->last;
	else
		ref = hash_find(table->partitions, key, table->shape);
	if (ref.counter != NULL)
	{
		counter_pin(ref.counter);
		table->last = ref;
		table->last_hash = key->hash;
		table->nremoved = nremoved;
	}
	else
		hash_plan(table->partitions, key->hash, spare);
	LWLockRelease(lock);
	return ref;
}

/*
 * Find the counter of a key and pin it.  Returns one with a NULL pointer if
 * the buffer does not hold the key.  Locks a partition of the table.
 */
CounterRef
table_pin(const CounterTable *table, const KeyBytes *key)
{
	LWLock	   *lock = hash_lock(table->partitions, key->hash, LW_SHARED);
	CounterRef	ref = hash_find(table->partitions, key, table->shape);

	if (ref.counter != NULL)
		counter_pin(ref.counter);
	LWLockRelease(lock);
	return ref;
}

/*
 * A key could not be created though no bound is reached: remember that, and
 * why, which is the result of creating it.
 */
static TableResult
note_refusal(TableResult result)
{
	refused_at = clock_now();
	refused_as = result;
	pg_atomic_write_u64(&shared_control->memory.exhausted_at,
						(uint64) refused_at);
	report_short_memory();
	return result;
}

/*
 * In PG_CATCH, after a key could not be created: keep the error, with a helpful
 * hint, for table_report_full() or table_warn_full().  Rethrows it if its cause
 * is not that memory is out.
 */
static void
keep_memory_error(void)
{
	MemoryContext oldcontext;
	ErrorData  *edata;

	if (refused_context == NULL)
		refused_context = AllocSetContextCreate(TopMemoryContext,
												"statbuffer memory error",
												ALLOCSET_SMALL_SIZES);
	MemoryContextReset(refused_context);
	oldcontext = MemoryContextSwitchTo(refused_context);
	edata = CopyErrorData();

	/* it was not dsa.c's size limit, for which create_counter() looks */
	if (edata->hint == NULL)
		edata->hint = pstrdup("Counts are kept in dynamic shared memory, of which the system has less than the setting \"statbuffer.max_memory\" allows.");
	MemoryContextSwitchTo(oldcontext);
	FlushErrorState();
	refused_error = edata;
	if (ERRCODE_TO_CATEGORY(edata->sqlerrcode) !=
		ERRCODE_INSUFFICIENT_RESOURCES)
		ReThrowError(edata);
}

/* Initialize a counter that is pinned once. */
static void
init_counter(SharedCounter *counter, const KeyBytes *key, uint8 shape)
{
	pg_atomic_init_u64(&counter->count, 0);
	pg_atomic_init_u64(&counter->in_flight, 0);
	pg_atomic_init_u64(&counter->counted_at, 0);
	counter->next = 0;
	counter->chain = InvalidDsaPointer;
	counter->error = InvalidDsaPointer;
	pg_atomic_init_u32(&counter->pins, 1);
	counter->changecount = 0;
	counter->failures = 0;
	counter->keylen = key->len;
	counter->shape = shape;
	counter->slot = 0;
	memcpy(counter->key, key->data, KEY_LENGTH(key->len));
}

/*
 * Create a counter for a key, and pin it; `spare' is planned.  If another
 * process has just created it, pins that one.  If there is no memory, returns
 * TABLE_FULL or TABLE_NO_MEMORY, and a counter with a NULL pointer.
 */
static TableResult
create_counter(SharedTable *shared, const CounterTable *table,
			   const KeyBytes *key, HashSpare *spare, CounterRef *ref)
{
	volatile CounterRef created = {NULL, InvalidDsaPointer};
	volatile bool refused = false;
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext context = CurrentMemoryContext;
	SpaceReserve reserve;

	ref->counter = NULL;
	space_reserve(&reserve, 1);

	/* all memory is allocated, and the counter is complete, before the lock */
	PG_TRY();
	{
		/* a segment that cannot be made must not be taken for a leak */
		CurrentResourceOwner = NULL;
		created.self = space_allocate_reserved(&reserve,
											   COUNTER_SIZE(key->len));
		if (DsaPointerIsValid(created.self))
		{
			LWLock	   *lock;

			created.counter = counter_at(created.self);
			init_counter(created.counter, key, table->shape);
			hash_prepare(spare);

			lock = hash_lock(table->partitions, key->hash, LW_EXCLUSIVE);
			*ref = hash_find(table->partitions, key, table->shape);
			if (ref->counter == NULL)
			{
				CounterRef	new = {created.counter, created.self};

				hash_insert(table->partitions, key->hash, new, spare);
				*ref = new;
				created.self = InvalidDsaPointer;
				account(shared, 1, KEY_COST(key->len));
			}
			else
				counter_pin(ref->counter);
			LWLockRelease(lock);
		}
	}
	PG_CATCH();
	{
		/* dsa.c raises errors with its locks held, which freeing takes, too */
		LWLockReleaseAll();
		CurrentResourceOwner = owner;
		MemoryContextSwitchTo(context);
		space_end_reserve(&reserve);
		if (DsaPointerIsValid(created.self))
			space_free(created.self);
		hash_free_spare(spare);
		keep_memory_error();
		refused = true;
		ref->counter = NULL;
	}
	PG_END_TRY();
	CurrentResourceOwner = owner;
	if (unlikely(refused))
		return note_refusal(TABLE_NO_MEMORY);

	space_end_reserve(&reserve);
	hash_free_spare(spare);
	if (DsaPointerIsValid(created.self))
		space_free(created.self);
	if (unlikely(ref->counter == NULL))
		return note_refusal(TABLE_FULL);
	if (unlikely(table_memory_is_short()))
		report_short_memory();
	return TABLE_CREATED;
}

/* Create the counter of a key, and pin it, if there is room for it. */
static pg_noinline TableResult
create_with_room(SharedTable *shared, CounterTable *table,
				 const KeyBytes *key, uint64 max_memory, HashSpare *spare,
				 CounterRef *ref)
{
	TableResult result = find_room(shared, max_memory, key->len);

	if (result == TABLE_CREATED)
	{
		if (unlikely(refused_at != 0))
		{
			if (!clock_passed(refused_at, clock_now(), REFUSED_MSECS))
				return refused_as;
			refused_at = 0;
		}
		return create_counter(shared, table, key, spare, ref);
	}
	if (result == TABLE_FULL)
		report_short_memory();
	return result;
}

/*
 * Find or create the counter of a key, and pin it.  `max_memory' is the bound
 * of the buffer's keys, in bytes, or 0.
 *
 * If there is no room for a new key, returns a result for which
 * table_is_full() is true, and a counter with a NULL pointer.  Then, and on
 * error, nothing is pinned.  Locks a partition of the table.
 */
TableResult
table_pin_or_create(SharedTable *shared, CounterTable *table,
					const KeyBytes *key, uint64 max_memory, CounterRef *ref)
{
	HashSpare	spare;

	*ref = find_and_pin(shared, table, key, &spare);
	if (likely(ref->counter != NULL))
		return TABLE_FOUND;
	return create_with_room(shared, table, key, max_memory, &spare, ref);
}

/* ------------------------------------------------------------------------
 * Many keys at a time
 * ------------------------------------------------------------------------
 */

/*
 * Find the counters of keys of one group, and pin them.  Those that the buffer
 * does not hold get one with a NULL pointer.  Raises an error if memory cannot
 * be mapped; then none is pinned.  Locks a partition of the table.
 */
void
table_pin_many(const CounterTable *table, HashItem *items, int n)
{
	LWLock	   *lock = hash_lock(table->partitions, items[0].key.hash, LW_SHARED);

	hash_find_many(table->partitions, items, n, table->shape);
	for (int i = 0; i < n; i++)
		if (items[i].ref.counter != NULL)
			counter_pin(items[i].ref.counter);
	LWLockRelease(lock);
}

/*
 * Free counters that table_allocate_many() has allocated and that are not in the
 * table.
 */
void
table_free_many(const HashItem *items, int n)
{
	for (int i = 0; i < n; i++)
		space_free(items[i].ref.self);
}

/*
 * In PG_CATCH, after counters could not be allocated or inserted, or buckets not
 * be reserved: free what was allocated, and remember that memory is out, as create_counter() does.  Raises the error again
 * if it is another one.
 */
static void
refuse_many(const HashItem *items, int n, HashSpare *spare,
			ResourceOwner owner, MemoryContext context)
{
	/* dsa.c raises errors with its locks held, which freeing takes, too */
	LWLockReleaseAll();
	CurrentResourceOwner = owner;
	MemoryContextSwitchTo(context);
	table_free_many(items, n);
	if (spare != NULL)
		hash_free_spare(spare);
	keep_memory_error();
	(void) note_refusal(TABLE_NO_MEMORY);
}

/*
 * Prepare to create so many keys of the partition that `key' is in, so that the
 * table need not grow for each.  If memory is out, does what is possible.
 */
void
table_reserve(const CounterTable *table, const KeyBytes *key, uint32 nkeys)
{
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext context = CurrentMemoryContext;
	HashSpare	spare = {0};

	if (unlikely(refused_at != 0))
		return;
	PG_TRY();
	{
		/* a segment that cannot be made must not be taken for a leak */
		CurrentResourceOwner = NULL;
		hash_reserve(table->partitions, key->hash, nkeys, &spare);
	}
	PG_CATCH();
	{
		refuse_many(NULL, 0, &spare, owner, context);
	}
	PG_END_TRY();
	CurrentResourceOwner = owner;
}

/*
 * Allocate counters for new keys of one group: the first ones, as many as there
 * is room for.  Each is complete, and pinned once.  Returns how many; for the
 * next key, table_pin_or_create() tells what there is no room for.
 *
 * `max_memory' is the bound of the buffer's keys, in bytes, or 0.  On error
 * nothing is allocated.
 */
int
table_allocate_many(SharedTable *shared, const CounterTable *table,
					HashItem *items, int n, uint64 max_memory)
{
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext context = CurrentMemoryContext;
	uint64		used = pg_atomic_read_u64(&shared_control->memory.nbytes);
	uint64		most = memory_eighths(KEY_MEMORY_EIGHTHS);
	volatile int nallocated = 0;
	SpaceReserve reserve;

	if (unlikely(refused_at != 0))
		return 0;
	if (max_memory > 0)
	{
		uint64		used_here = pg_atomic_read_u64(&shared->nbytes);
		uint64		left = max_memory - Min(used_here, max_memory);

		most = Min(most, used + left);
	}

	space_reserve(&reserve, n);
	PG_TRY();
	{
		/* a segment that cannot be made must not be taken for a leak */
		CurrentResourceOwner = NULL;
		while (nallocated < n)
		{
			HashItem   *item = &items[nallocated];

			used += KEY_COST(item->key.len);
			if (used > most)
				break;
			item->ref.self = space_allocate_reserved(&reserve,
													 COUNTER_SIZE(item->key.len));
			if (!DsaPointerIsValid(item->ref.self))
				break;
			nallocated++;
			item->ref.counter = counter_at(item->ref.self);
			init_counter(item->ref.counter, &item->key, table->shape);
		}
	}
	PG_CATCH();
	{
		space_end_reserve(&reserve);
		refuse_many(items, nallocated, NULL, owner, context);
		nallocated = 0;
	}
	PG_END_TRY();
	space_end_reserve(&reserve);
	CurrentResourceOwner = owner;
	return nallocated;
}

/*
 * Insert counters from table_allocate_many(): those before the first one whose
 * key is there, or for which no bucket is reserved.  Returns how many.  The caller
 * must free the others with table_free_many(), after it has noted these where
 * nothing can lose them: freeing may fail.
 *
 * If memory is out, none is inserted, and all are freed; returns -1.  The same
 * on error.  Locks a partition of the table.
 */
int
table_insert_many(SharedTable *shared, const CounterTable *table,
				  HashItem *items, int n)
{
	ResourceOwner owner = CurrentResourceOwner;
	MemoryContext context = CurrentMemoryContext;
	volatile int ninserted = -1;
	int64		size = 0;

	PG_TRY();
	{
		LWLock	   *lock = hash_lock(table->partitions, items[0].key.hash,
									 LW_EXCLUSIVE);

		ninserted = hash_insert_many(table->partitions, items, n, table->shape);
		LWLockRelease(lock);
	}
	PG_CATCH();
	{
		refuse_many(items, n, NULL, owner, context);
	}
	PG_END_TRY();

	for (int i = 0; i < ninserted; i++)
		size += KEY_COST(items[i].key.len);
	if (ninserted > 0)
		account(shared, ninserted, size);
	if (unlikely(table_memory_is_short()))
		report_short_memory();
	return ninserted;
}

/* ------------------------------------------------------------------------
 * Shapes
 * ------------------------------------------------------------------------
 */

/* Get a shape of a buffer, or NULL. */
static KeyShape *
shape_at(SharedTable *shared, int number)
{
	Assert(LWLockHeldByMe(&shared->lock));
	return dsa_get_address(shared_area, shared->shapes[number]);
}

/*
 * Look up the number of a shape in a buffer, and the set of the shapes whose
 * keys can be read under it, and store them in `table'.
 *
 * The number is TABLE_SHAPES, which no key has, if the shape has none.  With
 * `create' the shape gets one if there is room.  With `is_present', it is that
 * of the relation as the caller sees it, and has the numbers of its columns: from
 * here on, the keys of this shape are of these columns.  The caller has a lock
 * on the relation, or has claimed the buffer.
 *
 * Raises an error if memory is out.  Takes SharedTable.lock.
 */
void
table_find_shape(SharedTable *shared, const KeyShape *shape, bool create,
				 bool is_present, CounterTable *table)
{
	int			found = TABLE_SHAPES;
	int			unused = TABLE_SHAPES;
	uint32		readable = 0;
	dsa_pointer copy = InvalidDsaPointer;

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	for (int i = TABLE_SHAPES - 1; i >= 0; i--)
	{
		KeyShape   *other = shape_at(shared, i);

		if (other == NULL)
		{
			unused = i;
			continue;
		}
		if (shape_equal(shape, other))
			found = i;
		if (shape_can_read(shape, other))
			readable |= (uint32) 1 << i;
	}
	if (is_present && found < TABLE_SHAPES)
		shape_set_columns(shape_at(shared, found), shape);
	create = create && found == TABLE_SHAPES && unused < TABLE_SHAPES;
	if (create)
		copy = dsa_allocate_extended(shared_area,
									 Max(shape->size, SHAPE_MIN_ALLOC),
									 DSA_ALLOC_NO_OOM);
	if (DsaPointerIsValid(copy))
	{
		memcpy(dsa_get_address(shared_area, copy), shape, shape->size);
		shared->shapes[unused] = copy;
		shared->shapes_number++;
		readable |= (uint32) 1 << unused;
		found = unused;
	}
	table->shape = found;
	table->readable = readable;
	table->shapes_number = shared->shapes_number;
	LWLockRelease(&shared->lock);

	if (create && !DsaPointerIsValid(copy))
		table_report_full(TABLE_FULL, NULL);
}

/*
 * Copy a shape that keys have into the current memory context.  The caller has a
 * lock on the relation, or has claimed the buffer.  Takes SharedTable.lock.
 */
KeyShape *
table_copy_shape(SharedTable *shared, int number)
{
	KeyShape   *copy = palloc(SHAPE_MAX_SIZE);
	KeyShape   *shape;

	LWLockAcquire(&shared->lock, LW_SHARED);
	shape = shape_at(shared, number);
	memcpy(copy, shape, shape->size);
	LWLockRelease(&shared->lock);
	return copy;
}

/*
 * Are there shapes whose keys cannot be read under that of the table?  Perhaps
 * no key has them any more.  Takes SharedTable.lock.
 */
bool
table_has_unreadable(SharedTable *shared, const CounterTable *table)
{
	bool		any = false;

	LWLockAcquire(&shared->lock, LW_SHARED);
	for (int i = 0; i < TABLE_SHAPES; i++)
		any |= DsaPointerIsValid(shared->shapes[i]) &&
			(table->readable & ((uint32) 1 << i)) == 0;
	LWLockRelease(&shared->lock);
	return any;
}

/* Get the number of a buffer's shapes.  Takes SharedTable.lock. */
int
table_count_shapes(SharedTable *shared)
{
	int			n = 0;

	LWLockAcquire(&shared->lock, LW_SHARED);
	for (int i = 0; i < TABLE_SHAPES; i++)
		if (DsaPointerIsValid(shared->shapes[i]))
			n++;
	LWLockRelease(&shared->lock);
	return n;
}

/*
 * Remove the shapes that are not in the set `used', because no key has them.
 * The caller is the buffer's worker and holds AccessExclusiveLock on the
 * relation, or is about to remove the buffer.  Takes SharedTable.lock.
 */
void
table_remove_shapes(SharedTable *shared, uint32 used)
{
	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	shared->shapes_number++;
	for (int i = 0; i < TABLE_SHAPES; i++)
	{
		if (!DsaPointerIsValid(shared->shapes[i]) ||
			(used & ((uint32) 1 << i)) != 0)
			continue;
		dsa_free(shared_area, shared->shapes[i]);
		shared->shapes[i] = InvalidDsaPointer;
	}
	LWLockRelease(&shared->lock);
}

/* ------------------------------------------------------------------------
 * Freeing.  For the buffer's worker, or the process that removes the buffer.
 * ------------------------------------------------------------------------
 */

/* Does an error, which may be InvalidDsaPointer, have this message? */
static bool
has_message(dsa_pointer pointer, const char *message, int len)
{
	SharedError *error = dsa_get_address(shared_area, pointer);

	return error != NULL && strlen(error->message) == len &&
		memcmp(error->message, message, len) == 0;
}

/*
 * Make an error that no counter has yet.  Returns InvalidDsaPointer if memory
 * is out.
 */
static dsa_pointer
make_error(const char *message, int len)
{
	dsa_pointer pointer = shmem_try_allocate(offsetof(SharedError, message) +
											 len + 1, 0);
	SharedError *error = dsa_get_address(shared_area, pointer);

	if (error != NULL)
	{
		error->nkeys = 0;
		memcpy(error->message, message, len);
		error->message[len] = '\0';
	}
	return pointer;
}

/*
 * Give a counter an error, or none.  Frees the former one if no other counter
 * has it.
 */
static void
replace_error(SharedTable *shared, SharedCounter *counter, dsa_pointer error)
{
	dsa_pointer old = counter->error;
	SharedError *old_error;

	if (old == error)
		return;
	old_error = dsa_get_address(shared_area, old);

	LWLockAcquire(&shared->lock, LW_EXCLUSIVE);
	counter->error = error;
	if (DsaPointerIsValid(error))
		((SharedError *) dsa_get_address(shared_area, error))->nkeys++;
	if (old_error == NULL || --old_error->nkeys > 0)
		old = InvalidDsaPointer;
	LWLockRelease(&shared->lock);

	if (!DsaPointerIsValid(old))
		return;
	if (old == shared->last_error)
		shared->last_error = InvalidDsaPointer;
	dsa_free(shared_area, old);
}

/*
 * Give a counter an error with this message, cut to ERROR_MAX_SIZE, or none if
 * it is NULL.  Returns false if memory is out; then the former one stays.
 * Takes SharedTable.lock.
 */
bool
table_set_error(SharedTable *shared, SharedCounter *counter,
				const char *message)
{
	dsa_pointer error = InvalidDsaPointer;

	if (message != NULL)
	{
		int			len = pg_mbcliplen(message, strlen(message),
									   ERROR_MAX_SIZE - 1);

		/* it, or the key that failed before it, may have failed with this */
		if (has_message(counter->error, message, len))
			error = counter->error;
		else if (has_message(shared->last_error, message, len))
			error = shared->last_error;
		else
		{
			error = make_error(message, len);
			if (!DsaPointerIsValid(error))
				return false;
		}
	}
	replace_error(shared, counter, error);
	if (message != NULL)
		shared->last_error = error;
	return true;
}

/*
 * Free the counter that table_next() has returned.  The scan must have been
 * started with `to_delete'.  Takes SharedTable.lock.
 */
void
table_delete_current(SharedTable *shared, TableScan *scan, CounterRef ref)
{
	replace_error(shared, ref.counter, InvalidDsaPointer);
	account(shared, -1, -(int64) KEY_COST(ref.counter->keylen));
	pg_atomic_fetch_add_u64(&shared->nremoved, 1);
	hash_delete_current(&scan->scan);
	space_free(ref.self);
}

/*
 * Copy a counter to the present space, and have the hash table lead to the copy.
 * The caller has the counter replaced by it wherever else it is known, and frees
 * it.  If it was not replaced, returns a copy with a NULL pointer, and sets
 * `full' if there is no memory for one.
 *
 * A counter that is `linked' is on a list that only the caller accesses; others
 * are on none.  It is not replaced if that is not so any more, or if it is
 * pinned.  Raises an error if the system has no memory, or if memory cannot be
 * mapped; then nothing has changed.  Locks a partition of the table.
 */
CounterRef
table_move(SharedTable *shared, const CounterTable *table, CounterRef ref,
		   bool linked, bool *full)
{
	Size		size = COUNTER_SIZE(ref.counter->keylen);
	volatile dsa_pointer self = space_allocate(size, 0);
	CounterRef	copy = {NULL, InvalidDsaPointer};
	volatile bool moved = false;

	*full = !DsaPointerIsValid(self);
	if (*full)
		return copy;
	PG_TRY();
	{
		copy = counter_ref(self);
		moved = hash_move(table->partitions, ref, copy, size, linked,
						  &shared->nremoved);
	}
	PG_CATCH();
	{
		LWLockReleaseAll();
		space_free(self);
		PG_RE_THROW();
	}
	PG_END_TRY();
	if (!moved)
	{
		space_free(self);
		copy.counter = NULL;
	}
	return copy;
}

/*
 * Move the buckets of a table to the present space.  Returns false if there is
 * no memory for them.  Raises errors as table_move() does.
 */
bool
table_move_buckets(const CounterTable *table)
{
	dsa_pointer spare = InvalidDsaPointer;
	dsa_pointer *volatile held = &spare;
	bool		moved = true;

	PG_TRY();
	{
		for (int i = 0; i < HASH_PARTITIONS && moved; i++)
			moved = hash_move_buckets(table->partitions, i, held);
	}
	PG_CATCH();
	{
		LWLockReleaseAll();
		if (DsaPointerIsValid(*held))
			space_free(*held);
		PG_RE_THROW();
	}
	PG_END_TRY();
	return moved;
}

/* Free the first of the counters that were removed from the hash table. */
static void
free_first_removed(SharedTable *shared)
{
	CounterRef	ref = counter_ref(shared->removed);

	replace_error(shared, ref.counter, InvalidDsaPointer);
	account(shared, -1, -(int64) KEY_COST(ref.counter->keylen));
	shared->removed = ref.counter->chain;
	space_free(ref.self);
}

/*
 * Free keys, up to CLEAR_KEYS of them, when the buffer is removed.  Returns
 * false if there was none.  Raises an error if memory cannot be mapped; whoever
 * calls this next goes on.
 *
 * The keys of a part of the table are all over the memory.  To free them in the
 * order of their addresses takes a fraction of the time, because dsa.c looks up
 * the block of each.
 */
bool
table_clear(SharedTable *shared)
{
	int			size = Min(table_nkeys(shared), CLEAR_KEYS);
	dsa_pointer *pointers;
	int			n;

	space_note_use();

	/* what another process, or an error, has left */
	while (DsaPointerIsValid(shared->removed))
		free_first_removed(shared);
	if (size == 0)
		return false;
	pointers = palloc(size * sizeof(dsa_pointer));
	n = hash_take(dsa_get_address(shared_area, shared->partitions), pointers,
				  size, &shared->removed);

	/* put the list in order; its counters are mapped, so this cannot fail */
	sort_pointers(pointers, n);
	for (int i = 0; i < n; i++)
	{
		if (i + FETCH_AHEAD < n)
			counter_prefetch(pointers[i + FETCH_AHEAD]);
		counter_at(pointers[i])->chain = i + 1 < n ? pointers[i + 1] :
			InvalidDsaPointer;
	}
	shared->removed = n > 0 ? pointers[0] : InvalidDsaPointer;
	for (int i = 0; i < n; i++)
	{
		if (i + FETCH_AHEAD < n)
			counter_prefetch(pointers[i + FETCH_AHEAD]);
		free_first_removed(shared);
	}
	pfree(pointers);
	return n > 0;
}

/* Free an empty table that no buffer has. */
void
table_free(dsa_pointer partitions)
{
	hash_free_buckets(dsa_get_address(shared_area, partitions));
	dsa_free(shared_area, partitions);
}

/*
 * Replace an empty table by a new one.  It may lie in a segment that is
 * otherwise empty, and keep it from being returned to the system: the table was
 * made when there were keys around it.  The caller holds AccessExclusiveLock on
 * the relation, and must attach again.  Raises an error if memory is out.
 */
void
table_replace(SharedTable *shared)
{
	dsa_pointer partitions = table_create();
	dsa_pointer old = shared->partitions;

	Assert(table_nkeys(shared) == 0);
	shared->partitions = partitions;
	shared->number = pg_atomic_add_fetch_u64(&shared_control->last_table, 1);
	table_free(old);
	space_trim();
}

/*
 * Free an empty table and its shapes, when the buffer is removed.  Takes
 * SharedTable.lock.
 */
void
table_destroy(SharedTable *shared)
{
	Assert(table_nkeys(shared) == 0);
	table_remove_shapes(shared, 0);
	table_free(shared->partitions);
}
