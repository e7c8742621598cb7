/*-------------------------------------------------------------------------
 *
 * owner.h
 *	  The search path of a buffer's owner.
 *
 * Copyright (c) 2026, statbuffer developers
 *
 *-------------------------------------------------------------------------
 */
#ifndef STATBUFFER_OWNER_H
#define STATBUFFER_OWNER_H

/* What the catalogs say about a role that owns buffers. */
typedef struct OwnerInfo
{
	bool		exists;
	bool		may_log_in;		/* or need not: before 17 its workers must */
	bool		is_superuser;
} OwnerInfo;

/* What owner_leave() restores. */
typedef struct OwnerView
{
	Oid			userid;
	int			sec_context;
	int			nestlevel;
} OwnerView;

extern void owner_get_info(Oid owner, OwnerInfo *info);
extern char *owner_search_path(Oid owner);
extern void owner_enter(Oid owner, OwnerView *saved);
extern void owner_leave(const OwnerView *saved);

#endif							/* STATBUFFER_OWNER_H */
