/*-------------------------------------------------------------------------
 *
 * clock.h
 *	  The clock that nobody can set, and an alarm by it.
 *
 * Whatever is measured, waited for or put off goes by this clock: when the
 * system's clock is set back or forward, nothing comes late or early.  The
 * system's clock is only read to show a time, or to write it to a file.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_CLOCK_H
#define STATBUFFER_CLOCK_H

#include <time.h>

#include "utils/timestamp.h"

/*
 * A time in microseconds.  It means the same to all processes for as long as
 * the machine runs, and so for as long as shared memory lives.  0 is no time.
 */
typedef int64 ClockTime;

/*
 * Times count from a thousand years before the machine was started.  So the
 * longest interval before any time is still a time, and 0 is long past.
 */
#define CLOCK_START		(INT64CONST(365000) * USECS_PER_DAY)

/* of a processor's counter, which counts some 1 to 5 in a nanosecond */
#define CLOCK_MOMENT_TICKS	50000

/*
 * Not instr_time: that may be a processor's own counter, which is for what one
 * process measures.
 */
static inline ClockTime
clock_now(void)
{
	struct timespec now;

	(void) clock_gettime(CLOCK_MONOTONIC, &now);
	return CLOCK_START + (int64) now.tv_sec * USECS_PER_SEC +
		now.tv_nsec / 1000;
}

static inline ClockTime
clock_add(ClockTime time, int64 msecs)
{
	return time + msecs * 1000;
}

/* Is it so many milliseconds or more since then? */
static inline bool
clock_passed(ClockTime since, ClockTime now, int64 msecs)
{
	return now >= clock_add(since, msecs);
}

/*
 * How long WaitLatch() must wait for a time, in milliseconds: rounded up, and in
 * steps that a long can hold everywhere.
 */
static inline long
clock_get_timeout(ClockTime when, ClockTime now)
{
	if (when <= now)
		return 0;
	return Min((when - now + 999) / 1000, 3600 * 1000);
}

/*
 * A delay that doubles with each of `times' failures, from `msecs' up to
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
 * What is to be added to a time to have it as a timestamp, as the system's
 * clock is set just now.
 */
static inline int64
clock_to_timestamp(void)
{
	ClockTime	now = clock_now();

	return GetCurrentTimestamp() - now;
}

/*
 * Is it worth looking again at what only others change?  True unless this
 * processor was here a moment ago, which is some ten microseconds.  That takes
 * a few instructions where the processor has a counter to be read, whose speed
 * and starting point do not matter.  Elsewhere it is always true.
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
