/*-------------------------------------------------------------------------
 *
 * saved.h
 *	  The file of counts that were not stored at shutdown.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SAVED_H
#define STATBUFFER_SAVED_H

/* in the data directory */
#define SAVED_FILE			"statbuffer.saved"
#define SAVED_LOADING_FILE	"statbuffer.loading"

/* How far saved_load() has come. */
typedef enum SavedProgress
{
	SAVED_LOADED,				/* all that there was */
	SAVED_BLOCKED,				/* a buffer has a worker */
	SAVED_FAILED				/* there was an error */
} SavedProgress;

extern bool saved_is_pending(void);
extern SavedProgress saved_load(void);
extern void saved_write(void);

#endif							/* STATBUFFER_SAVED_H */
