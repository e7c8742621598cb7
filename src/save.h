/*-------------------------------------------------------------------------
 *
 * save.h
 *	  Saving the counts that a clean shutdown could not store.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_SAVE_H
#define STATBUFFER_SAVE_H

extern void save_all(void);

#endif							/* STATBUFFER_SAVE_H */
