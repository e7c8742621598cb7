/*-------------------------------------------------------------------------
 *
 * counter.h
 *	  One counter in shared memory: its layout, flags and atomic changes.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_COUNTER_H
#define STATBUFFER_COUNTER_H

#include "clock.h"
#include "key.h"
#include "port/atomics.h"
#include "space.h"
#include "storage/s_lock.h"
#include "utils/dsa.h"

/*
 * SharedCounter.pins: flags in the high bits, the number of pins in the others
 */
#define COUNTER_LINKED		((uint32) 1 << 31)	/* on a list of the schedule */
#define COUNTER_DRAIN		((uint32) 1 << 30)	/* (w) a drain waits for it */
#define COUNTER_SUSPECT		((uint32) 1 << 29)	/* (w) was in a batch that
												 * failed */
#define COUNTER_ASKED		((uint32) 1 << 28)	/* has a SharedFlushRequest */
#define COUNTER_REQUESTED	((uint32) 1 << 27)	/* (w) was made due by a
												 * request */
#define COUNTER_PINS		(COUNTER_REQUESTED - 1)

/*
 * The count of one key.
 *
 * A counter is found through the buffer's table, and kept alive by the lock of
 * the table's partition, by a pin, or by being the worker: only the worker
 * frees counters, only those that are not pinned, not linked and empty, and
 * only under that lock.  It also moves them, with the same conditions but that
 * they may be linked and have a count: see move.c.
 *
 * `counted_at' is 0 if nothing was counted since the count was last taken.
 * Otherwise it is the time of the first increment since then, plus the jitter,
 * and the key is due an interval later; for a failing key it is the time of
 * the next attempt.  A process that changes it from 0 must also link the
 * counter.  The worker sets it to 0 before it takes the count, so that
 * anything added afterwards is scheduled anew.
 *
 * `count' and `in_flight' are read together, by counter_read().  Only the
 * worker moves anything between them, and `changecount' is odd while it does.
 *
 * The count that the worker has taken is in its batch until its transaction
 * ends: the transaction's callbacks commit or restore it, whichever way it
 * ends.  If a process is killed in between, the server reinitializes shared
 * memory.
 *
 * Fields marked (w) are written by the buffer's worker only.
 */
typedef struct SharedCounter
{
	pg_atomic_uint64 count;		/* as int64 */
	pg_atomic_uint64 in_flight; /* as int64 (w) */
	pg_atomic_uint64 counted_at;	/* as ClockTime */

	/* on a list: the next counter; else (w) the time of the last take */
	uint64		next;
	dsa_pointer chain;			/* the next counter in the hash table's
								 * bucket; under the partition's lock */
	dsa_pointer error;			/* (w) SharedError; under SharedTable.lock */
	pg_atomic_uint32 pins;
	uint16		changecount;	/* (w) */
	uint16		failures;		/* (w) attempts that failed in a row; also
								 * written under AccessExclusiveLock */
	uint16		keylen;			/* constant, as is the key */
	uint8		shape;			/* constant; see CounterTable */
	uint8		slot;			/* (w) where in the wheel */
	char		key[FLEXIBLE_ARRAY_MEMBER];
} SharedCounter;

/* A counter, with the pointer by which other processes find it. */
typedef struct CounterRef
{
	SharedCounter *counter;		/* NULL: none */
	dsa_pointer self;
} CounterRef;

/*
 * Get a counter's address; NULL for InvalidDsaPointer.  Raises an error if its
 * segment cannot be mapped.
 */
static inline SharedCounter *
counter_at(dsa_pointer pointer)
{
	return space_address(pointer);
}

/* The same, with the pointer. */
static inline CounterRef
counter_ref(dsa_pointer pointer)
{
	CounterRef	ref = {counter_at(pointer), pointer};

	return ref;
}

/*
 * Have the processor fetch a counter's memory, which is accessed soon; nothing
 * for InvalidDsaPointer.  Raises an error if its segment cannot be mapped.
 */
static inline void
counter_prefetch(dsa_pointer pointer)
{
	if (DsaPointerIsValid(pointer))
	{
		char	   *counter = (char *) counter_at(pointer);

		/* it need not begin where a line does */
		compat_prefetch(counter);
		compat_prefetch(counter + offsetof(SharedCounter, key) + sizeof(uint64));
	}
}

/*
 * (w) Call these before and after moving anything between `count' and
 * `in_flight'.
 */
static inline void
counter_begin_change(SharedCounter *counter)
{
	counter->changecount++;
	pg_memory_barrier();
}

static inline void
counter_end_change(SharedCounter *counter)
{
	pg_write_barrier();
	counter->changecount++;
}

/* Read `count' and `in_flight' consistently. */
static inline void
counter_read(SharedCounter *counter, int64 *count, int64 *in_flight)
{
	volatile uint16 *changecount = &counter->changecount;

	for (;;)
	{
		uint16		before = *changecount;

		pg_read_barrier();
		*count = (int64) pg_atomic_read_u64(&counter->count);
		*in_flight = (int64) pg_atomic_read_u64(&counter->in_flight);
		pg_read_barrier();
		if (likely((before & 1) == 0 && before == *changecount))
			return;
		SPIN_DELAY();
	}
}

/*
 * Set the LINKED bit.  Returns whether the caller must put the counter on a
 * list.
 */
static inline bool
counter_link(SharedCounter *counter)
{
	return (pg_atomic_fetch_or_u32(&counter->pins, COUNTER_LINKED) &
			COUNTER_LINKED) == 0;
}

static inline bool
counter_has_flag(SharedCounter *counter, uint32 flag)
{
	return (pg_atomic_read_u32(&counter->pins) & flag) != 0;
}

static inline void
counter_set_flag(SharedCounter *counter, uint32 flag)
{
	pg_atomic_fetch_or_u32(&counter->pins, flag);
}

static inline void
counter_clear_flag(SharedCounter *counter, uint32 flag)
{
	pg_atomic_fetch_and_u32(&counter->pins, ~flag);
}

static inline void
counter_pin(SharedCounter *counter)
{
	pg_atomic_fetch_add_u32(&counter->pins, 1);
}

static inline void
counter_unpin(SharedCounter *counter)
{
	pg_atomic_fetch_sub_u32(&counter->pins, 1);
}

#endif							/* STATBUFFER_COUNTER_H */
