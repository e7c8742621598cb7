/*-------------------------------------------------------------------------
 *
 * statbuffer.h
 *	  The settings and the version of the module.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_H
#define STATBUFFER_H

/* must match statbuffer.control */
#define STATBUFFER_VERSION	"1.0"

extern int	statbuffer_max_memory;	/* kilobytes */
extern int	statbuffer_max_shutdown;	/* milliseconds */
extern int	statbuffer_max_workers;

#endif							/* STATBUFFER_H */
