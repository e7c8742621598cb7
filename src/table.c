/*-------------------------------------------------------------------------
 *
 * table.c
 *	  A buffer's table of counters by key: create, find, read, scan.
 *
 * Each buffer has a dshash table whose entries only point to the counters.
 * So a counter is as small as its key allows, and has a dsa_pointer, which
 * dshash does not reveal for its entries.
 *
 * The locks of the table's partitions protect the set of counters.  Their
 * contents are changed by atomic operations, without these locks.
 *
 * This room also accounts for the memory that keys take, and keeps the
 * shapes of a buffer's keys.  No other file knows that the table is a dshash.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "compat.h"
#include "miscadmin.h"
#include "settings.h"
#include "table.h"
#include "utils/memutils.h"

/* An entry of a buffer's table. */
typedef struct TableEntry
{
	dsa_pointer counter;		/* InvalidDsaPointer: the key searched for */
} TableEntry;

#define COUNTER_SIZE(keylen) \
	(offsetof(SharedCounter, key) + KEY_LENGTH(keylen))

/*
 * The memory that a key uses: the entry with dshash's header, its share of the
 * table's buckets, of which there are 1.3 to 2.7 per key, and the counter, for
 * which dsa.c has size classes in steps of 16 bytes (or somewhat coarser).
 */
#define KEY_COST(keylen) \
	(MAXALIGN(sizeof(TableEntry)) + 16 + 2 * sizeof(dsa_pointer) + \
	 TYPEALIGN(16, COUNTER_SIZE(keylen)))

/*
 * The share of statbuffer.max_memory that keys may use, and the share from
 * which on they are flushed early.  The rest is for a table's new buckets
 * while it still has the old ones, for the registry, and for what allocation
 * wastes.
 *
 * We must refuse a key before dsa.c does.  If dsa.c cannot get a block, it
 * leaks the block's descriptor, and with it a segment that could have been
 * returned.
 */
#define KEY_MEMORY_EIGHTHS		7
#define SHORT_MEMORY_EIGHTHS	5

/*
 * Shapes are small and live long.  If they were allocated from the size
 * classes of most keys, each shape would keep a block from being returned when
 * the keys are gone.
 */
#define SHAPE_MIN_ALLOC			256

/* The key searched for; an entry without a counter stands for it. */
static const KeyBytes *searched = NULL;
static uint8 searched_shape;

/* ------------------------------------------------------------------------
 * Making and attaching
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
		.tranche_id = shared_control->tranches.counters
	};

	return params;
}

static dshash_table *
attach_handle(dshash_table_handle handle)
{
	dshash_parameters params = table_parameters();
	MemoryContext oldcontext = MemoryContextSwitchTo(TopMemoryContext);
	dshash_table *dshash = dshash_attach(shared_area, &params, handle, NULL);

	MemoryContextSwitchTo(oldcontext);
	return dshash;
}

/* Create an empty table.  Raises an error if memory is out. */
dshash_table_handle
table_create(void)
{
	dshash_parameters params = table_parameters();
	dshash_table *dshash = dshash_create(shared_area, &params, NULL);
	dshash_table_handle handle = dshash_get_hash_table_handle(dshash);

	dshash_detach(dshash);
	return handle;
}

/* Free an empty table that does not belong to a buffer. */
void
table_destroy_handle(dshash_table_handle handle)
{
	dshash_destroy(attach_handle(handle));
}

/*
 * Initialize the struct of a new buffer, with a table from table_create().
 * Cannot fail.
 */
void
table_init(SharedTable *shared, dshash_table_handle handle)
{
	shared->handle = handle;
	shared->number = 1;
	pg_atomic_init_u64(&shared->nkeys, 0);
	pg_atomic_init_u64(&shared->nbytes, 0);
	pg_atomic_init_u32(&shared->failing, 0);
	LWLockInitialize(&shared->lock, shared_control->tranches.table);
	for (int i = 0; i < TABLE_SHAPES; i++)
		shared->shapes[i] = InvalidDsaPointer;
	shared->shapes_number = 0;
}

/*
 * Attach to the table of a buffer, unless already attached.  Does not set the
 * shape: see table_find_shape().  Raises an error if memory is out.
 */
void
table_attach(SharedTable *shared, CounterTable *table)
{
	if (table->dshash != NULL)
	{
		if (table->number == shared->number)
			return;
		table_detach(table);
	}
	table->number = shared->number;
	table->dshash = attach_handle(shared->handle);
}

/* Detach, if attached. */
void
table_detach(CounterTable *table)
{
	if (table->dshash != NULL)
		dshash_detach(table->dshash);
	table->dshash = NULL;
}

/* ------------------------------------------------------------------------
 * Reading
 * ------------------------------------------------------------------------
 */

/*
 * Find a key and lock its partition.  Returns NULL, without a lock, if it does
 * not exist.
 */
static TableEntry *
find_entry(const CounterTable *table, const KeyBytes *key)
{
	TableEntry	probe = {InvalidDsaPointer};

	searched = key;
	searched_shape = table->shape;
	return dshash_find(table->dshash, &probe, false);
}

/*
 * Get what is counted for a key and not yet stored.  Returns false if the
 * buffer does not hold the key.  Locks a partition of the table.
 */
bool
table_lookup(const CounterTable *table, const KeyBytes *key, int64 *count)
{
	TableEntry *entry = find_entry(table, key);
	int64		in_flight;

	if (entry == NULL)
		return false;
	counter_read(counter_at(entry->counter), count, &in_flight);
	dshash_release_lock(table->dshash, entry);

	/* counters_pin() keeps the sum in range */
	*count += in_flight;
	return true;
}

/*
 * Begin a scan of all keys, of any shape.  With `to_delete', partitions are
 * locked exclusively.
 */
void
table_begin_scan(TableScan *scan, const CounterTable *table, bool to_delete)
{
	dshash_seq_init(&scan->status, table->dshash, to_delete);
}

/*
 * Get the next counter, with the lock of its partition held.  At the end,
 * returns one with a NULL pointer.
 */
CounterRef
table_next(TableScan *scan)
{
	TableEntry *entry = dshash_seq_next(&scan->status);

	return counter_ref(entry != NULL ? entry->counter : InvalidDsaPointer);
}

/* End a scan, and release its lock. */
void
table_end_scan(TableScan *scan)
{
	dshash_seq_term(&scan->status);
}

/*
 * Call the visitor for every key that can be read under the table's shape.  It
 * is called under a partition lock and, if there is an error,
 * SharedTable.lock.
 */
void
table_visit(SharedTable *shared, const CounterTable *table,
			CounterVisitor visit, void *arg)
{
	TableScan	scan;
	CounterRef	ref;

	table_begin_scan(&scan, table, false);
	while ((ref = table_next(&scan)).counter != NULL)
	{
		SharedCounter *counter = ref.counter;
		CounterInfo info;

		if (!table_can_read(table, counter))
			continue;
		info.key = counter->key;
		info.keylen = counter->keylen;
		info.counted_at = (ClockTime) pg_atomic_read_u64(&counter->counted_at);
		counter_read(counter, &info.count, &info.in_flight);
		info.failures = counter->failures;
		info.error = NULL;
		if (info.failures == 0)
			visit(&info, arg);
		else
		{
			LWLockAcquire(&shared->lock, LW_SHARED);
			if (DsaPointerIsValid(counter->error))
				info.error = ((SharedError *)
							  dsa_get_address(shared_area,
											  counter->error))->message;
			visit(&info, arg);
			LWLockRelease(&shared->lock);
		}
	}
	table_end_scan(&scan);
}

/*
 * Get the number of keys with a count that is not stored, of any shape, and
 * the sum of these counts.  As with the statistics, the sum may wrap.
 */
void
table_sum(const CounterTable *table, uint64 *nkeys, int64 *sum)
{
	TableScan	scan;
	CounterRef	ref;
	uint64		total = 0;

	*nkeys = 0;
	table_begin_scan(&scan, table, false);
	while ((ref = table_next(&scan)).counter != NULL)
	{
		int64		count,
					in_flight;

		counter_read(ref.counter, &count, &in_flight);
		total += (uint64) count + (uint64) in_flight;
		if (count != 0 || in_flight != 0)
			(*nkeys)++;
	}
	table_end_scan(&scan);
	*sum = (int64) total;
}

/* ------------------------------------------------------------------------
 * Memory
 * ------------------------------------------------------------------------
 */

static inline uint64
memory_eighths(int eighths)
{
	return (uint64) statbuffer_max_memory * 1024 / 8 * eighths;
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
 * in total?  Takes no lock, so the answer is only an estimate.
 */
bool
table_has_room(uint64 nkeys, uint64 size)
{
	return shared_control != NULL &&
		pg_atomic_read_u64(&shared_control->memory.nbytes) +
		nkeys * (KEY_COST(0) + 16) + size <= memory_eighths(KEY_MEMORY_EIGHTHS);
}

/* Ask the launcher to request early flushes. */
static void
report_short_memory(void)
{
	if (pg_atomic_exchange_u32(&shared_control->memory.short_of_memory, 1) == 0)
		launcher_slot_wake();
}

/* Raise the error that statbuffer.max_memory is used up. */
void
table_report_out_of_memory(void)
{
	ereport(ERROR,
			(errcode(ERRCODE_OUT_OF_MEMORY),
			 errmsg("out of memory for statbuffer keys"),
			 errdetail("All memory that \"%s\" allows is in use.",
					   "statbuffer.max_memory"),
			 errhint("You might need to increase \"%s\". The view \"%s\" shows which buffer holds that much and whether it can be flushed.",
					 "statbuffer.max_memory", "sb_stat_buffers")));
}

/* Account for a key that was created (sign 1) or freed (sign -1). */
static void
account(SharedTable *shared, uint16 keylen, int sign)
{
	int64		size = sign * (int64) KEY_COST(keylen);

	pg_atomic_fetch_add_u64(&shared->nkeys, sign);
	pg_atomic_fetch_add_u64(&shared->nbytes, size);
	pg_atomic_fetch_add_u64(&shared_control->memory.nbytes, size);
}

/* ------------------------------------------------------------------------
 * Finding and making counters
 * ------------------------------------------------------------------------
 */

/*
 * Find the counter of a key and pin it.  Returns one with a NULL pointer if
 * the buffer does not hold the key.  Locks a partition of the table.
 */
CounterRef
table_pin(const CounterTable *table, const KeyBytes *key)
{
	TableEntry *entry = find_entry(table, key);
	CounterRef	ref = {NULL, InvalidDsaPointer};

	if (entry != NULL)
	{
		ref = counter_ref(entry->counter);
		counter_pin(ref.counter);
		dshash_release_lock(table->dshash, entry);
	}
	return ref;
}

/*
 * In PG_CATCH, after a key could not be created: rethrow the error with a
 * helpful hint.
 */
static void
rethrow_memory_error(void)
{
	ErrorData  *edata;
	MemoryContext oldcontext = MemoryContextSwitchTo(TopTransactionContext);

	/* a lock that may still be held is released with the transaction */
	edata = CopyErrorData();
	FlushErrorState();
	MemoryContextSwitchTo(oldcontext);
	report_short_memory();

	/*
	 * Was it dsa.c's size limit, which dshash's buckets have reached?  What
	 * the system has refused has the same SQLSTATE.
	 */
	if (edata->sqlerrcode == ERRCODE_OUT_OF_MEMORY && edata->funcname != NULL &&
		strcmp(edata->funcname, "dsa_allocate_extended") == 0)
		table_report_out_of_memory();
	if (edata->hint == NULL)
		edata->hint = pstrdup("Counts are kept in dynamic shared memory, of which the system has less than the setting \"statbuffer.max_memory\" allows.");
	ReThrowError(edata);
}

/* Create a counter for a key, and pin it. */
static CounterRef
create_counter(SharedTable *shared, const CounterTable *table,
			   const KeyBytes *key)
{
	dsa_pointer volatile self = InvalidDsaPointer;
	CounterRef	ref;
	SharedCounter *counter;
	TableEntry	probe = {InvalidDsaPointer};
	TableEntry *entry = NULL;
	bool		found;

	if (pg_atomic_read_u64(&shared_control->memory.nbytes) + KEY_COST(key->len) >
		memory_eighths(KEY_MEMORY_EIGHTHS))
	{
		report_short_memory();
		table_report_out_of_memory();
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
		/* dsa.c raises errors with its locks held, which freeing takes, too */
		LWLockReleaseAll();
		if (DsaPointerIsValid(self))
			dsa_free(shared_area, self);
		rethrow_memory_error();
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
		counter->changecount = 0;
		counter->failures = 0;
		counter->keylen = key->len;
		counter->shape = table->shape;
		counter->slot = 0;
		memcpy(counter->key, key->data, KEY_LENGTH(key->len));
		entry->counter = self;
		account(shared, key->len, 1);
		ref.counter = counter;
		ref.self = self;
	}
	else
	{
		/* another process has just created it */
		ref = counter_ref(entry->counter);
		counter_pin(ref.counter);
	}
	dshash_release_lock(table->dshash, entry);

	if (found)
		dsa_free(shared_area, self);
	else if (unlikely(table_memory_is_short()))
		report_short_memory();
	return ref;
}

/*
 * Find or create the counter of a key, and pin it.  Raises an error if memory
 * is out; then nothing is pinned.  Locks a partition of the table.
 */
CounterRef
table_pin_or_create(SharedTable *shared, const CounterTable *table,
					const KeyBytes *key)
{
	CounterRef	ref = table_pin(table, key);

	return likely(ref.counter != NULL) ? ref :
		create_counter(shared, table, key);
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
 * `create' the shape gets one if there is room.  The caller has a lock on the
 * relation, or has claimed the buffer.
 *
 * Raises an error if memory is out.  Takes SharedTable.lock.
 */
void
table_find_shape(SharedTable *shared, const KeyShape *shape, bool create,
				 CounterTable *table)
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
		table_report_out_of_memory();
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

/*
 * Make a counter point to another error.  Frees the old one if no other
 * counter points to it.  Takes SharedTable.lock.
 */
void
table_replace_error(SharedTable *shared, SharedCounter *counter,
					dsa_pointer error)
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

	if (DsaPointerIsValid(old))
		dsa_free(shared_area, old);
}

/*
 * Free the counter that table_next() has returned.  The scan must have been
 * started with `to_delete'.  Takes SharedTable.lock.
 */
void
table_delete_current(SharedTable *shared, TableScan *scan, CounterRef ref)
{
	table_replace_error(shared, ref.counter, InvalidDsaPointer);
	account(shared, ref.counter->keylen, -1);
	dshash_delete_current(&scan->status);
	dsa_free(shared_area, ref.self);
}

/*
 * Replace an empty table by a new one, because dshash never shrinks its array
 * of buckets.  The caller holds AccessExclusiveLock on the relation, and must
 * attach again.  Raises an error if memory is out.
 */
void
table_replace(SharedTable *shared)
{
	dshash_table_handle handle = table_create();
	CounterTable old = {.dshash = NULL};

	Assert(table_nkeys(shared) == 0);
	table_attach(shared, &old);
	shared->handle = handle;
	shared->number++;
	dshash_destroy(old.dshash);
	shmem_trim();
}

/*
 * Free an empty table and its shapes, when the buffer is removed.  Takes
 * SharedTable.lock.
 */
void
table_destroy(SharedTable *shared, CounterTable *table)
{
	Assert(table_nkeys(shared) == 0);
	table_remove_shapes(shared, 0);
	dshash_destroy(table->dshash);
	table->dshash = NULL;
}
