/*-------------------------------------------------------------------------
 *
 * counters.h
 *	  A transaction's side of the shared counters.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_COUNTERS_H
#define STATBUFFER_COUNTERS_H

#include "registry.h"

/*
 * Each transaction checks beforehand that what it adds stays in bigint's
 * range, but does not see what concurrent transactions are about to add.  That
 * is safe while deltas and counts are moderate: even the maximum number of
 * backends cannot get from one limit to the end of the range.  Others take
 * turns; see counters_pin().
 *
 * Larger deltas may not take a key beyond LARGE_COUNT, so that no increment
 * with a moderate delta fails or waits because of them.  A key beyond
 * LARGE_COUNT is flushed early.
 */
#define MODERATE_DELTA		(INT64CONST(1) << 40)
#define LARGE_COUNT			(INT64CONST(1) << 61)
#define MODERATE_COUNT		(INT64CONST(1) << 62)

/* Is |value| <= limit? */
static inline bool
count_is_within(int64 value, int64 limit)
{
	return (uint64) value + (uint64) limit <= 2 * (uint64) limit;
}

/* A pinned counter, to which a backend can add without failing. */
typedef struct CounterPin
{
	CounterRef	ref;			/* no counter: not pinned */
	bool		locked;			/* its transaction takes a turn */
} CounterPin;

/* A saved count, for counters_create_loaded(). */
typedef struct LoadedCount
{
	KeyBytes	key;
	int64		count;
	ClockTime	counted_at;
} LoadedCount;

/* What counters_move() has moved, for counters_move_back(). */
typedef struct MovedCount
{
	int64		count;
	ClockTime	counted_at;
} MovedCount;

/* for all processes that hold a lock on the relation */
extern TableResult counters_pin(SharedBuffer *buffer,
								CounterTable *table,
								const KeyBytes *key, int64 delta,
								CounterPin *pin);
extern void counters_pin_many(SharedBuffer *buffer, const CounterTable *table,
							  const KeyBytes *keys, CounterPin **pins, int n,
							  uint32 nexpected);
extern TableResult counters_pin_now(SharedBuffer *buffer,
									CounterTable *table,
									const KeyBytes *key, int64 delta,
									CounterPin *pin);
extern TableResult counters_probe(SharedBuffer *buffer,
								  CounterTable *table,
								  const KeyBytes *key);
extern void counters_prepare_to_pin(SharedBuffer *buffer, int64 delta);
extern void counters_pin_held(SharedBuffer *buffer,
							  CounterTable *table,
							  const KeyBytes *key, int64 delta,
							  CounterPin *pin);
extern void counters_check_open(void);
extern void counters_add(SharedBuffer *buffer, CounterPin *pin, int64 delta,
						 ClockTime *now);
extern int	counters_create_loaded(SharedBuffer *buffer,
								   const CounterTable *table,
								   const LoadedCount *loaded, int n,
								   HashItem *items, int *nallocated);
extern void counters_add_loaded(SharedBuffer *buffer, CounterPin *pin,
								int64 delta, ClockTime counted_at);
extern void counters_unpin(SharedBuffer *buffer, CounterPin *pin);
extern void counters_end_turn(SharedBuffer *buffer);
extern void counters_pin_all(const CounterTable *table, CounterPin **pins,
							 int *npins);
extern void counters_clear(SharedBuffer *buffer, CounterPin *pin);
extern void counters_move(SharedBuffer *buffer, CounterRef from, CounterRef to,
						  MovedCount *moved);
extern void counters_move_back(SharedBuffer *buffer, CounterRef from,
							   CounterRef to, const MovedCount *moved);
extern void counters_request_flush(SharedBuffer *buffer,
								   const CounterTable *table,
								   const KeyBytes *key);

/* for the process that saves the counts */
extern bool counters_wait_unpinned(SharedBuffer *buffer,
								   SharedCounter *counter, ClockTime until);

#endif							/* STATBUFFER_COUNTERS_H */
