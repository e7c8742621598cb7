/*-------------------------------------------------------------------------
 *
 * owner.h
 *	  Where a session of a buffer's owner looks.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_OWNER_H
#define STATBUFFER_OWNER_H

/* What is as it was again after owner_leave(). */
typedef struct OwnerView
{
	Oid			userid;
	int			sec_context;
	int			nestlevel;
} OwnerView;

extern char *owner_search_path(Oid owner);
extern void owner_enter(Oid owner, OwnerView *saved);
extern void owner_leave(const OwnerView *saved);

#endif							/* STATBUFFER_OWNER_H */
