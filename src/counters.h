/*-------------------------------------------------------------------------
 *
 * counters.h
 *	  The shared counters.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_COUNTERS_H
#define STATBUFFER_COUNTERS_H

#include "key.h"
#include "shared.h"

/* SharedCounter.pins: flags above, the number of pins below */
#define COUNTER_LINKED		(((uint32) 1) << 31)	/* on a list of the
													 * schedule */
#define COUNTER_DRAIN		(((uint32) 1) << 30)	/* counts for a drain (w) */
#define COUNTER_SUSPECT		((uint32) 1 << 29)	/* was in a batch that failed
												 * (w) */
#define COUNTER_ASKED		((uint32) 1 << 28)	/* a SharedFlushRequest is
												 * there */
#define COUNTER_PINS		(COUNTER_ASKED - 1)

/*
 * Concurrent transactions each make sure beforehand that what they add stays
 * in bigint's range, and none of them sees what the others are about to add.
 * That is sound without further ado while deltas and counts are moderate:
 * even as many backends as PostgreSQL can have do not get from one limit to
 * the end of the range.  Others go by turns; see counters_pin().
 *
 * Larger deltas do not take a key beyond LARGE_COUNT, so that no increment of
 * a moderate delta fails or waits for them; and a key that has more than that
 * is flushed early.
 */
#define MODERATE_DELTA		(INT64CONST(1) << 40)
#define LARGE_COUNT			(INT64CONST(1) << 61)
#define MODERATE_COUNT		(INT64CONST(1) << 62)

static inline bool
count_is_within(int64 value, int64 limit)
{
	return (uint64) value + (uint64) limit <= 2 * (uint64) limit;
}

/* Why a key failed; shared by keys that failed with the same words. */
typedef struct SharedError
{
	uint32		nkeys;			/* counters that point here */
	char		message[FLEXIBLE_ARRAY_MEMBER];
} SharedError;

/*
 * The count of one key.
 *
 * Found through the buffer's table, and kept alive by the lock of the table's
 * partition, by a pin, or by being the worker: only the worker frees counters,
 * only such as are not pinned, not linked and empty, and under that lock.
 *
 * `counted_at' is 0 when nothing was counted since the last take, else when
 * it was first, and the flush is due an interval later; for a failing key it
 * is when the next attempt is due.  Who changes it from 0 sees to it that the counter is linked.
 * The worker sets it to 0 before it takes the count, so that what is added
 * afterwards is scheduled anew.
 *
 * `count' and `in_flight' are read together, by counters_read().  The worker
 * is the only one to move anything between them; `version' is odd while it
 * does.
 *
 * What the worker took is in its batch until its transaction ends: the
 * transaction's callbacks settle it, whichever way it ends.  A process that
 * is killed meanwhile takes the whole of shared memory with it.
 *
 * Fields marked (w) are written by the buffer's worker only.
 */
typedef struct SharedCounter
{
	pg_atomic_uint64 count;		/* as int64 */
	pg_atomic_uint64 in_flight; /* as int64 (w) */
	pg_atomic_uint64 counted_at;	/* as ClockTime, with jitter */

	/* on a list: the next counter; else (w) the time of the last take */
	uint64		next;
	dsa_pointer error;			/* (w) SharedError; under SharedBuffer.lock */
	pg_atomic_uint32 pins;
	uint16		version;		/* (w) */
	uint16		failures;		/* (w) attempts that failed in a row; also
								 * written under AccessExclusiveLock */
	uint16		keylen;			/* constant, as is the key */
	uint8		shape;			/* constant; see CounterTable */
	uint8		slot;			/* (w) where in the wheel */
	char		key[FLEXIBLE_ARRAY_MEMBER];
} SharedCounter;

/*
 * A key's last attempt did not fail.  Its error is freed by batch_tidy().  For
 * the worker, or under AccessExclusiveLock.
 */
static inline void
counters_clear_failure(SharedBuffer *buffer, SharedCounter *counter)
{
	if (counter->failures > 0)
	{
		counter->failures = 0;
		pg_atomic_fetch_sub_u32(&buffer->failing, 1);
	}
}

/*
 * A table of counters as a process is attached to it.
 *
 * When the key columns of a buffer are altered, the counters that it has stay
 * with the shape that they were made with.  They are found no more by those
 * who count.  They are flushed if they can be read under the present shape,
 * and otherwise not until the columns are as they were.
 */
typedef struct CounterTable
{
	dshash_table *dshash;		/* NULL: not attached */
	uint32		number;			/* SharedBuffer.table_number */
	uint32		shapes_number;	/* SharedBuffer.shapes_number */
	uint8		shape;			/* the number of the shape in use, or
								 * SHARED_SHAPES: there are no keys of it */
	uint32		readable;		/* set of numbers whose keys it can read */
} CounterTable;

/* Can the counter's key be read by those who use the table? */
static inline bool
counter_is_readable(const CounterTable *table, const SharedCounter *counter)
{
	return (table->readable & ((uint32) 1 << counter->shape)) != 0;
}

static inline SharedCounter *
counter_at(dsa_pointer pointer)
{
	return dsa_get_address(shared_area, pointer);
}

/* A backend's hold on a counter: what it needs to add without failing. */
typedef struct CounterPin
{
	SharedCounter *counter;		/* NULL: not held */
	dsa_pointer self;
	bool		locked;			/* its transaction takes a turn */
} CounterPin;

/* What counters_scan() tells of a key. */
typedef struct CounterInfo
{
	const char *key;
	int			keylen;
	int64		count;
	int64		in_flight;
	ClockTime	counted_at;		/* as in SharedCounter */
	int			failures;
	const char *error;			/* or NULL */
} CounterInfo;

/* Called under a partition lock: must only copy. */
typedef void (*CounterVisitor) (const CounterInfo *info, void *arg);

extern dshash_table *counters_create_table(void);
extern void counters_attach_table(SharedBuffer *buffer, CounterTable *table);

/* for everyone who holds a lock on the relation */
extern bool counters_lookup(const CounterTable *table, const KeyBytes *key,
							int64 *count);
extern void counters_pin(SharedBuffer *buffer, const CounterTable *table,
						 const KeyBytes *key, int64 delta, int64 most,
						 CounterPin *pin);
extern bool counters_add(SharedBuffer *buffer, CounterPin *pin, int64 delta);
extern void counters_schedule(SharedBuffer *buffer, CounterPin *pin,
							  ClockTime counted_at, ClockTime due_at);
extern void counters_check_open(void);
extern void counters_unpin(SharedBuffer *buffer, CounterPin *pin);
extern void counters_pin_now(SharedBuffer *buffer, const CounterTable *table,
							 const KeyBytes *key, int64 delta,
							 CounterPin *pin);
extern void counters_end_turn(SharedBuffer *buffer);
extern CounterPin *counters_pin_all(const CounterTable *table, int *npins);
extern void counters_clear(SharedBuffer *buffer, CounterPin *pin);
extern void counters_request_flush(SharedBuffer *buffer,
								   const CounterTable *table,
								   const KeyBytes *key);
extern dsa_pointer counters_prepare_request(const CounterPin *pin);
extern void counters_pin_request(const CounterPin *pin);
extern void counters_make_request(SharedBuffer *buffer, dsa_pointer pointer);
extern void counters_sum(const CounterTable *table, uint64 *nkeys,
						 int64 *sum);
extern void counters_scan(SharedBuffer *buffer, const CounterTable *table,
						  CounterVisitor visit, void *arg);

extern void counters_report_out_of_memory(void);
extern bool counters_are_crowded(void);
extern bool counters_have_room(uint64 nkeys, uint64 size);

/* for the buffer's worker, or who frees the buffer */
extern void counters_replace_error(SharedBuffer *buffer,
								   SharedCounter *counter, dsa_pointer error);
extern void counters_reap(SharedBuffer *buffer, const CounterTable *table,
						  ClockTime idle_before);
extern void counters_replace_table(SharedBuffer *buffer);
extern void counters_remove_shapes(SharedBuffer *buffer, ClockTime now);
extern void counters_drop_buffer(SharedBuffer *buffer, bool with_database);
extern bool counters_wait_unpinned(SharedBuffer *buffer,
								   const CounterTable *table,
								   ClockTime until);

#endif							/* STATBUFFER_COUNTERS_H */
