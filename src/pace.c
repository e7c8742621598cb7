/*-------------------------------------------------------------------------
 *
 * pace.c
 *	  How many keys a batch may have, so that it does not take too long.
 *
 * A call of a handler that takes arrays cannot be cut short.  So the number of
 * its keys is chosen by how long the batches before have taken.  A handler
 * that takes one key a call can be cut short after any of them, but then all
 * others have been taken and sorted in vain, and a key that comes last in the
 * order of keys would come last again and again.  So its batches are chosen in
 * the same way.
 *
 * A batch takes a fixed time and some for each key.  To make batches smaller
 * only helps against the latter: a handler that waits a second for another
 * server takes that second for each batch, and stores less with each, the
 * smaller they are.  From two batches of different sizes we know both.
 *
 * Batches that have failed tell nothing.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "pace.h"

/* the share of the time that we aim at, so that it is not always exceeded */
#define TARGET_SHARE	0.75

/* batches as quick as this share of it may have twice as many keys */
#define QUICK_SHARE		0.5

/* a batch has at most this many times the keys of the one before */
#define MAX_GROWTH		4

/* batches whose sizes differ by less than this factor are not compared */
#define MIN_RATIO		1.25

/*
 * after this many batches of a single key that took too long, have one of two:
 * otherwise we would never know that it does not take longer
 */
#define TRY_TWO			8

/*
 * Estimate the part of a batch's time that does not depend on the number of
 * its keys.
 */
static double
estimate_fixed(const SharedPace *pace, int nkeys, int64 usecs)
{
	double		per_key;

	if (pace->nkeys == 0 ||
		(nkeys < pace->nkeys * MIN_RATIO && pace->nkeys < nkeys * MIN_RATIO))
		return Min(pace->fixed, usecs);
	per_key = (double) (usecs - pace->usecs) / (nkeys - pace->nkeys);
	return Max((double) usecs - Max(per_key, 0) * nkeys, 0);
}

/*
 * A batch of `nkeys' keys was stored in `usecs' microseconds: choose how many
 * the next one may have.  It should take `usecs_allowed' at most; 0 means as
 * long as it likes.  If the batch was `cut' short because of that, the next one
 * has no more keys, so that those that were left come first.
 */
void
pace_note(SharedPace *pace, int nkeys, int64 usecs, int64 usecs_allowed,
		  bool cut)
{
	double		fixed;
	double		limit;

	Assert(nkeys > 0 && usecs >= 0);
	if (usecs_allowed == 0)
	{
		memset(pace, 0, sizeof(SharedPace));
		return;
	}

	fixed = estimate_fixed(pace, nkeys, usecs);
	pace->nkeys = nkeys;
	pace->usecs = usecs;
	pace->fixed = (int64) fixed;
	if (cut || usecs > usecs_allowed)
	{
		/* let the keys have at least half of the time */
		limit = Max(usecs_allowed * TARGET_SHARE, fixed) * nkeys /
			Max(usecs - fixed, 1);
		limit = Min(limit, (double) nkeys * (cut ? 1 : MAX_GROWTH));

		/* it was a small one, and others may have that many already */
		if (!cut && limit >= nkeys &&
			(pace->limit == 0 || limit <= pace->limit))
			return;
		if (nkeys == 1 && limit < 2 && !cut && pace->singles++ % TRY_TWO == 0)
			limit = 2;
	}
	else if (usecs < usecs_allowed * QUICK_SHARE && pace->limit > 0 &&
			 nkeys >= pace->limit)
		limit = (double) pace->limit * 2;
	else
		return;
	pace->limit = (int) Max(Min(limit, PG_INT32_MAX), 1);
}
