/*-------------------------------------------------------------------------
 *
 * table.h
 *	  A buffer's table of counters by key.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_TABLE_H
#define STATBUFFER_TABLE_H

#include "counter.h"
#include "hashtable.h"
#include "shape.h"
#include "storage/lwlock.h"

/* maximum number of shapes of a buffer's keys; a set of them is a uint32 */
#define TABLE_SHAPES		32
#define TABLE_ALL_SHAPES	PG_UINT32_MAX

/*
 * A table of counters, as all processes see it.
 *
 * A process that reads or writes it must hold a lock on the relation, to the
 * end of the transaction, or must have claimed the buffer, as its worker does.
 * So the worker may replace an empty table under AccessExclusiveLock, and no
 * process uses a table that is being destroyed with its relation.
 */
typedef struct SharedTable
{
	/*
	 * The partitions, and a number that no other table has.  Written under
	 * AccessExclusiveLock on the relation, read under AccessShareLock.
	 */
	dsa_pointer partitions;
	uint64		number;

	/* keys held, and the bytes that they use; changed with the table */
	pg_atomic_uint64 nkeys;
	pg_atomic_uint64 nbytes;

	/*
	 * How many times a counter has left the table, or its place in memory.
	 * Increased under the lock of its partition, so that under this lock,
	 * whoever finds the number unchanged still knows where a counter is.
	 */
	pg_atomic_uint64 nremoved;
	pg_atomic_uint32 failing;	/* keys whose last attempt failed */

	/*
	 * Protects the shapes, and the errors that counters point to.
	 *
	 * `shapes' are those that keys have, or recently had, each a KeyShape or
	 * InvalidDsaPointer.  A shape is only removed under AccessExclusiveLock
	 * on the relation.  `shapes_number' changes with them; it is read without
	 * the lock to see whether they must be searched again.
	 */
	LWLock		lock;
	dsa_pointer shapes[TABLE_SHAPES];
	uint32		shapes_number;

	/*
	 * The SharedError that was last given to a key, or InvalidDsaPointer if
	 * no key has it any more.  For the worker.
	 */
	dsa_pointer last_error;

	/*
	 * Counters that were removed from the hash table and are still to be
	 * freed, a list through `chain'.  They still count as keys that are held.
	 * For the process that removes the buffer.
	 */
	dsa_pointer removed;

	/*
	 * The number of the last move of spaces for which all counters were
	 * moved.  For the process that has claimed the buffer.
	 */
	uint32		moved;
} SharedTable;

/* Why a key failed; shared by keys that failed with the same message. */
typedef struct SharedError
{
	uint32		nkeys;			/* counters that point here */
	char		message[FLEXIBLE_ARRAY_MEMBER];
} SharedError;

/*
 * A process's attachment to a table of counters.
 *
 * When the key columns of a buffer are altered, existing counters keep the
 * shape with which they were made.  Increments no longer find them.  They are
 * flushed if they can be read under the present shape.  Otherwise convert.c
 * moves their counts to keys of the present shape; those that cannot be
 * converted stay until the columns are altered again.
 */
typedef struct CounterTable
{
	HashPartition *partitions;	/* NULL: not attached */
	uint64		number;			/* SharedTable.number */
	uint32		shapes_number;	/* SharedTable.shapes_number */
	uint8		shape;			/* number of the shape in use, or TABLE_SHAPES
								 * if it has none */
	uint32		readable;		/* set of the shapes whose keys can be read
								 * under it */

	/*
	 * The counter that was pinned last, of a key with this hash, which is
	 * still there if SharedTable.nremoved is the same; or one with a NULL
	 * pointer.  A session often counts the same key again.
	 */
	CounterRef	last;
	uint32		last_hash;
	uint64		nremoved;
} CounterTable;

/* Can the counter's key be read under the table's shape? */
static inline bool
table_can_read(const CounterTable *table, const SharedCounter *counter)
{
	return (table->readable & ((uint32) 1 << counter->shape)) != 0;
}

/* The number of keys that a buffer holds, of any shape. */
static inline uint64
table_nkeys(SharedTable *shared)
{
	return pg_atomic_read_u64(&shared->nkeys);
}

/* The bytes that a table takes, with its keys. */
static inline uint64
table_memory(SharedTable *shared)
{
	return pg_atomic_read_u64(&shared->nbytes) +
		HASH_PARTITIONS * sizeof(HashPartition);
}

/*
 * Clear a key's failures.  batch_tidy() frees its error.  For the worker, or
 * under AccessExclusiveLock.  Takes no lock, cannot fail.
 */
static inline void
table_clear_failure(SharedTable *shared, SharedCounter *counter)
{
	if (counter->failures > 0)
	{
		counter->failures = 0;
		pg_atomic_fetch_sub_u32(&shared->failing, 1);
	}
}

/* A key as table_visit() passes it to the visitor. */
typedef struct CounterInfo
{
	const char *key;
	int			keylen;
	int			shape;
	int64		count;
	int64		in_flight;
	ClockTime	counted_at;		/* as in SharedCounter */
	int			failures;
	const char *error;			/* or NULL */
} CounterInfo;

/* What table_pin_or_create() has done. */
typedef enum TableResult
{
	TABLE_FOUND,				/* has pinned a counter that was there */
	TABLE_CREATED,				/* has pinned one that it has created */
	TABLE_BUFFER_FULL,			/* no room within the buffer's bound */
	TABLE_FULL,					/* no room within statbuffer.max_memory */
	TABLE_NO_MEMORY				/* the system has no memory */
} TableResult;

/*
 * Keys that are found or created together: up to HASH_MANY, whose hashes have
 * this in common.
 */
static inline int
table_group(uint32 hash)
{
	return hash_partition_number(hash);
}

#define TABLE_GROUPS		HASH_PARTITIONS

/* Is there no room for a new key? */
static inline bool
table_is_full(TableResult result)
{
	return result >= TABLE_BUFFER_FULL;
}

/* Called under a partition lock: must only copy. */
typedef void (*CounterVisitor) (const CounterInfo *info, void *arg);

/* A scan of a table, in portions: see HashScan. */
typedef struct TableScan
{
	HashScan	scan;
} TableScan;

extern dsa_pointer table_create(void);
extern void table_init(SharedTable *shared, dsa_pointer partitions);
extern void table_attach(SharedTable *shared, CounterTable *table);
extern void table_detach(CounterTable *table);
extern void table_free(dsa_pointer partitions);

/* for all processes that hold a lock on the relation */
extern bool table_read(const CounterTable *table, const KeyBytes *key,
					   int64 *count, int64 *in_flight);
extern CounterRef table_pin(const CounterTable *table, const KeyBytes *key);
extern void table_pin_many(const CounterTable *table, HashItem *items, int n);
extern void table_reserve(const CounterTable *table, const KeyBytes *key,
						  uint32 nkeys);
extern int	table_allocate_many(SharedTable *shared, const CounterTable *table,
								HashItem *items, int n, uint64 max_memory);
extern int	table_insert_many(SharedTable *shared, const CounterTable *table,
							  HashItem *items, int n);
extern void table_free_many(const HashItem *items, int n);
extern TableResult table_pin_or_create(SharedTable *shared,
									   CounterTable *table,
									   const KeyBytes *key, uint64 max_memory,
									   CounterRef *ref);
extern void table_visit(SharedTable *shared, const CounterTable *table,
						CounterVisitor visit, void *arg);
extern void table_sum(const CounterTable *table, uint32 shapes, uint64 *nkeys,
					  int64 *sum);
extern bool table_visit_portion(SharedTable *shared,
								const CounterTable *table, TableScan *scan,
								CounterVisitor visit, void *arg);
extern void table_begin_scan(TableScan *scan, const CounterTable *table,
							 bool to_delete);
extern bool table_begin_portion(TableScan *scan);
extern CounterRef table_next(TableScan *scan);
extern void table_end_portion(TableScan *scan);
extern uint64 table_scan_position(const TableScan *scan);
extern uint64 table_position(const KeyBytes *key);

/* memory */
extern bool table_memory_is_short(void);
extern bool table_has_room(uint64 nkeys, uint64 size, uint64 max_memory);
extern bool table_is_short(SharedTable *shared, uint64 max_memory);
extern bool table_may_be_full(SharedTable *shared, uint64 max_memory,
							  uint16 keylen);
extern void table_report_full(TableResult result, const char *name);
extern void table_warn_full(int elevel, TableResult result, const char *name,
							uint64 nkeys);

/* shapes */
extern void table_find_shape(SharedTable *shared, const KeyShape *shape,
							 bool create, bool is_present,
							 CounterTable *table);
extern KeyShape *table_copy_shape(SharedTable *shared, int number);
extern bool table_has_unreadable(SharedTable *shared,
								 const CounterTable *table);
extern int	table_count_shapes(SharedTable *shared);

/* for the buffer's worker, or the process that removes the buffer */
extern void table_delete_current(SharedTable *shared, TableScan *scan,
								 CounterRef ref);
extern bool table_set_error(SharedTable *shared, SharedCounter *counter,
							const char *message);
extern CounterRef table_move(SharedTable *shared, const CounterTable *table,
							 CounterRef ref, bool linked, bool *full);
extern bool table_move_buckets(const CounterTable *table);
extern void table_remove_shapes(SharedTable *shared, uint32 used);
extern void table_replace(SharedTable *shared);
extern bool table_clear(SharedTable *shared);
extern void table_destroy(SharedTable *shared);

#endif							/* STATBUFFER_TABLE_H */
