/*-------------------------------------------------------------------------
 *
 * statbuffer.h
 *	  The settings of the module.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_H
#define STATBUFFER_H

extern int	statbuffer_max_memory;	/* kilobytes */
extern int	statbuffer_max_workers;

#endif							/* STATBUFFER_H */
