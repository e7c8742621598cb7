/*-------------------------------------------------------------------------
 *
 * clock.c
 *	  An alarm by the clock that nobody can set.
 *
 * PostgreSQL's own timeouts go by the system's clock: while that is behind
 * where it was when one was enabled, it does not come.  An alarm is a signal of
 * its own, SIGUSR2, which PostgreSQL does not use in background workers.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "clock.h"

static timer_t alarm_timer;
static volatile ClockTime alarm_at = 0;

/* To be called once in a process, which is a background worker. */
void
clock_make_alarm(pqsigfunc handler)
{
	struct sigevent event = {0};

	event.sigev_notify = SIGEV_SIGNAL;
	event.sigev_signo = SIGUSR2;
	if (timer_create(CLOCK_MONOTONIC, &event, &alarm_timer) != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_RESOURCES),
				 errmsg("could not create a timer: %m")));
	pqsignal(SIGUSR2, handler);
}

/*
 * See to it that the alarm goes off at `when', or earlier.  There is one alarm:
 * its handler finds out what it is for, and calls this again.
 *
 * An alarm that nobody needs any more is not taken back.  So who sets one again
 * and again, and is done in time, makes few system calls.
 */
void
clock_alarm_by(ClockTime when)
{
	ClockTime	now = clock_now();
	int64		usecs = Max(when - now, 1);
	struct itimerspec timer = {0};

	if (alarm_at > now && alarm_at <= when)
		return;
	alarm_at = when;
	timer.it_value.tv_sec = usecs / USECS_PER_SEC;
	timer.it_value.tv_nsec = usecs % USECS_PER_SEC * 1000;
	(void) timer_settime(alarm_timer, 0, &timer, NULL);
}
