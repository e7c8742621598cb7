/*-------------------------------------------------------------------------
 *
 * pace.h
 *	  How many keys a batch may have, so that it does not take too long.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_PACE_H
#define STATBUFFER_PACE_H

/*
 * What is known of the time that a buffer's batches take.  For the worker
 * only; it is in shared memory because the next worker continues from here.
 * All zeros: nothing is known.
 */
typedef struct SharedPace
{
	int			limit;			/* maximum number of keys; 0: none */

	/* the last batch that was stored */
	int			nkeys;			/* 0: none */
	int64		usecs;			/* how long that took */
	int64		fixed;			/* estimate of the part of that which does not
								 * depend on the number of keys */
	uint32		singles;		/* batches of a single key that took too long */
} SharedPace;

extern void pace_note(SharedPace *pace, int nkeys, int64 usecs,
					  int64 usecs_allowed, bool cut);

/* How many keys may the next batch have, out of `size'? */
static inline int
pace_limit(const SharedPace *pace, int size)
{
	return pace->limit > 0 ? Min(pace->limit, size) : size;
}

#endif							/* STATBUFFER_PACE_H */
