/*-------------------------------------------------------------------------
 *
 * clock.h
 *	  The monotonic clock, and an alarm that uses it.
 *
 * We use this clock for all measurements, timeouts and delays, so that nothing
 * happens late or early when the system clock is set.  The system clock is only
 * read to show a time, or to write it to a file.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_CLOCK_H
#define STATBUFFER_CLOCK_H

#include <time.h>

#include "port/atomics.h"
#include "utils/timestamp.h"

/*
 * A time in microseconds.  It has the same meaning in all processes as long as
 * the machine runs, and thus as long as shared memory exists.  0 means no
 * time.
 */
typedef int64 ClockTime;

/*
 * Times are relative to a thousand years before the machine was started.  So
 * subtracting the longest interval still gives a valid time, and 0 is long
 * past.
 */
#define CLOCK_START		(INT64CONST(365000) * USECS_PER_DAY)

/*
 * in ticks of the processor's timestamp counter, which has 1 to 5 in a
 * nanosecond
 */
#define CLOCK_MOMENT_TICKS	50000

/*
 * Get the present time.
 *
 * This does not use instr_time, which may be a processor's timestamp counter
 * and is only meant for measurements within a process.
 */
static inline ClockTime
clock_now(void)
{
	struct timespec now;

	(void) clock_gettime(CLOCK_MONOTONIC, &now);
	return CLOCK_START + (int64) now.tv_sec * USECS_PER_SEC +
		now.tv_nsec / 1000;
}

/* Add milliseconds to a time. */
static inline ClockTime
clock_add(ClockTime time, int64 msecs)
{
	return time + msecs * 1000;
}

/* Have at least `msecs' passed since then? */
static inline bool
clock_passed(ClockTime since, ClockTime now, int64 msecs)
{
	return now >= clock_add(since, msecs);
}

/*
 * Get the timeout for WaitLatch(), in milliseconds, to wait until a time.  It
 * is rounded up, and limited to what fits in a long everywhere, so the caller
 * must check the time and wait again.
 */
static inline long
clock_get_timeout(ClockTime when, ClockTime now)
{
	if (when <= now)
		return 0;
	return Min((when - now + 999) / 1000, 3600 * 1000);
}

/*
 * May something happen now that is limited to once in `msecs' milliseconds?  If
 * so, sets `last', the time when it happened last; 0: never.
 */
static inline bool
clock_limit(ClockTime *last, ClockTime now, int64 msecs)
{
	if (*last != 0 && !clock_passed(*last, now, msecs))
		return false;
	*last = now;
	return true;
}

/* The same for something that several processes do. */
static inline bool
clock_limit_shared(pg_atomic_uint64 *last, int64 msecs)
{
	uint64		seen = pg_atomic_read_u64(last);
	ClockTime	now = clock_now();

	if (seen != 0 && !clock_passed((ClockTime) seen, now, msecs))
		return false;
	return pg_atomic_compare_exchange_u64(last, &seen, (uint64) now);
}

/*
 * Exponential backoff: double `msecs' once for each of `times' failures, up to
 * `most'.
 */
static inline int64
clock_double(int64 msecs, int times, int64 most)
{
	for (int i = 0; i < times && msecs < most; i++)
		msecs *= 2;
	return Min(msecs, most);
}

/*
 * Get the offset to add to a ClockTime to convert it to a TimestampTz, as the
 * system clock is set at the moment.
 */
static inline int64
clock_to_timestamp(void)
{
	ClockTime	now = clock_now();

	return GetCurrentTimestamp() - now;
}

/*
 * Is it worth checking again for changes by other processes?
 *
 * Returns false if the last call that returned true was a moment ago, which is
 * some ten microseconds.  That takes a few instructions if the processor has a
 * timestamp counter, whose speed and starting point do not matter.  Elsewhere
 * it always returns true.
 */
static inline bool
clock_moment_passed(uint64 *last)
{
#if defined(__x86_64__) && defined(__GNUC__)
	uint64		now = __builtin_ia32_rdtsc();

	if (likely(now - *last < CLOCK_MOMENT_TICKS))
		return false;
	*last = now;
#endif
	return true;
}

extern void clock_make_alarm(pqsigfunc handler);
extern void clock_alarm_by(ClockTime when);

#endif							/* STATBUFFER_CLOCK_H */
