/*-------------------------------------------------------------------------
 *
 * load.h
 *	  Loading the counts that were saved at the last shutdown.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_LOAD_H
#define STATBUFFER_LOAD_H

/* The result of load_continue(). */
typedef enum LoadProgress
{
	LOAD_FINISHED,				/* everything is in memory */
	LOAD_BLOCKED,				/* a buffer has a worker */
	LOAD_FAILED					/* there was an error */
} LoadProgress;

/* What is still to be read of the file. */
typedef struct LoadRest
{
	const char *name;			/* of the file */
	int64		section;		/* offset of the section that was being read,
								 * or 0 */
	int64		offset;			/* of the first record that was not loaded, or
								 * not completely */
	uint32		nkeys;			/* keys of it that were loaded */
} LoadRest;

/* for all processes */
extern bool load_is_pending(void);
extern bool load_is_pending_for(Oid dboid, Oid relid, uint64 position);

/* for the launcher, or the process that acts as the launcher */
extern LoadProgress load_continue(void);
extern bool load_find_rest(LoadRest *rest);
extern bool load_is_saved(void);
extern void load_set_saved(void);

#endif							/* STATBUFFER_LOAD_H */
