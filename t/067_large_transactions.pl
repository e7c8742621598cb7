# Transactions that count a great many keys: they take them in the same order
# whatever the session has done before; they can be cancelled until they commit;
# and when a session's memory runs out while it counts, what fails is undone and
# the rest is exact.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;
use TestLibrary;

plan skip_all => 'needs a compiler and the headers of the server' if !can_build_library();

my $db = 'postgres';
my $tempdir = PostgreSQL::Test::Utils::tempdir;

# While the file out_of_memory.ID is there, with a process's ID, that process gets
# no large piece of memory.  If cancel.ID is there, it is cancelled when it gets
# the next one of more than half a megabyte.  Sanitizers have an allocator of
# their own.
my $has_sanitizers = qx{pg_config --cflags} =~ /-fsanitize/;
my $shim = build_library('malloc_shim', qq{
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
extern void *__libc_malloc(size_t);
extern void *__libc_realloc(void *, size_t);
static int
is_out(size_t size)
{
	char		name[1024];
	int			saved = errno;
	int			there;
	if (size < 60000)
		return 0;
	snprintf(name, sizeof(name), "$tempdir/out_of_memory.%d", (int) getpid());
	there = access(name, F_OK) == 0;
	errno = there ? ENOMEM : saved;
	return there;
}
static void
cancel_if_asked(void)
{
	char		name[1024];
	int			saved = errno;
	snprintf(name, sizeof(name), "$tempdir/cancel.%d", (int) getpid());
	if (unlink(name) == 0)
	{
		*(volatile sig_atomic_t *) dlsym(RTLD_DEFAULT, "QueryCancelPending") = 1;
		*(volatile sig_atomic_t *) dlsym(RTLD_DEFAULT, "InterruptPending") = 1;
	}
	errno = saved;
}
void *
malloc(size_t size)
{
	if (size > 500000)
		cancel_if_asked();
	return is_out(size) ? NULL : __libc_malloc(size);
}
void *
realloc(void *pointer, size_t size)
{
	return is_out(size) ? NULL : __libc_realloc(pointer, size);
}
}) if !$has_sanitizers;

# A session that has loaded this is cancelled, or terminated, whenever a
# subtransaction has committed, as if that request came in just then.
my $stopper = build_library('stopper', q{
#include "postgres.h"
#include "access/xact.h"
#include "fmgr.h"
#include "miscadmin.h"
#include "utils/guc.h"
PG_MODULE_MAGIC;
extern PGDLLEXPORT void _PG_init(void);
static bool cancel = false;
static bool terminate = false;
static void
stop(SubXactEvent event, SubTransactionId id, SubTransactionId parent, void *arg)
{
	if (event != SUBXACT_EVENT_COMMIT_SUB || !(cancel || terminate))
		return;
	if (cancel)
		QueryCancelPending = true;
	if (terminate)
		ProcDiePending = true;
	InterruptPending = true;
}
void
_PG_init(void)
{
	DefineCustomBoolVariable("stopper.cancel", "", NULL, &cancel, false, PGC_USERSET, 0, NULL, NULL, NULL);
	DefineCustomBoolVariable("stopper.terminate", "", NULL, &terminate, false, PGC_USERSET, 0, NULL, NULL, NULL);
	RegisterSubXactCallback(stop, NULL);
}
});

my $node;
{
	local $ENV{LD_PRELOAD} = $shim if $shim;
	$node = new_node('large', 'statbuffer.max_workers = 4');
}

# --- the order ----------------------------------------------------------------

# From 10,000 keys on, keys are taken in the order of their hashes.  That can be
# seen by which of several keys is refused when none has room for what is added.
# It is the same one in whatever order they were counted, also in the first
# transaction of a session, whose process knows nothing of the shared memory yet.
my @full = map { "full $_" } 1 .. 5;

make_buffer($node, $db, 'ordered', q{interval '1h', timeout '1h'});
sql(join ';', map { "SELECT sb_increment('$full[$_]', 2000000000000000001 + $_, 'ordered')" } 0 .. $#full);
sub refused
{
	my ($before, @keys) = @_;
	my $error = error_of(join(';', $before, 'BEGIN', q{INSERT INTO ordered SELECT 'x' || g FROM generate_series(1, 10000) g},
			(map { "SELECT sb_increment('$_', 1000000000000000000, 'ordered')" } @keys), 'COMMIT'));

	like($error, qr/count is too large/, 'a key has no room');
	return $error =~ /The key has (\d+) counted/ ? $1 : $error;
}
my $first = refused('SELECT', @full);
is(refused('SELECT', reverse @full), $first, 'the first transaction of a session takes keys in the order of their hashes');
is(refused(q{SELECT sb_increment('before', 1, 'ordered')}, reverse @full), $first, 'and so do later ones');
is(sql(q{SELECT count(*) FROM ordered}), 6, 'none of them has counted anything');

# --- cancelled and terminated while they commit -------------------------------

make_buffer($node, $db, 'stopped', q{interval '1h', timeout '1h'});
sql('CREATE TABLE written (a int)');

# A transaction that counts 20,000 keys in savepoints, with what comes before.
sub transaction
{
	my ($before, @more) = @_;

	return join ';', "LOAD '$stopper'", $before, 'BEGIN', 'INSERT INTO written VALUES (1)',
	  (map { ("SAVEPOINT s$_", "INSERT INTO stopped SELECT g, 1 FROM generate_series($_ * 1000, $_ * 1000 + 999) g") } 1 .. 20),
	  @more, 'COMMIT';
}
my $state = q{SELECT (SELECT count(*) FROM written), (SELECT count(*) FROM stopped), (SELECT coalesce(sum(count), 0) FROM stopped)};
my %stops = (
	cancel => qr/ERROR:  canceling statement due to user request/,
	terminate => qr/FATAL:  terminating connection due to administrator command/);
foreach my $how (sort keys %stops)
{
	like(error_of(transaction("SET stopper.$how = on")), $stops{$how}, "$how: its COMMIT fails");
	is(sql($state), '0|0|0', "$how: nothing of it is left");

	# these are gone through one by one, though there is nothing to publish
	like(error_of(transaction("SET stopper.$how = on", 'INSERT INTO stopped SELECT g, -1 FROM generate_series(1000, 20999) g')),
		$stops{$how}, "$how: the same with keys whose counts are 0 in the end");
	is(sql($state), '0|0|0', "$how: nothing of that is left either");

	like(error_of(transaction("SET stopper.$how = on", 'TRUNCATE stopped')), $stops{$how}, "$how: and with TRUNCATE");
}
sql(transaction('SELECT'));
is(sql($state), '1|20000|20000', 'without that it commits, with all that it has counted');
foreach my $how (sort keys %stops)
{
	like(error_of(transaction("SET stopper.$how = on", 'TRUNCATE stopped')), $stops{$how}, "$how: a COMMIT after TRUNCATE fails");
	is(sql($state), '1|20000|20000', "$how: and discards nothing");
}
wait_for($node, $db, q{SELECT keys = 20000 FROM sb_stat_buffers WHERE buffer = 'stopped'}, 'no key stays that was made in vain');
is(sql(q{TRUNCATE written; SELECT sb_drain('stopped')}), 't', 'all can be stored');
is(stored($node, $db, 'stopped'), 20000, 'and is stored once');

# TRUNCATE pins every key.  It is cancelled when it has allocated the space to
# remember them, before the first one.
SKIP:
{
	skip 'there is no other allocator with sanitizers', 1 if $has_sanitizers;

	make_buffer($node, $db, 'emptied', q{interval '1h', timeout '100ms'});
	sql(q{INSERT INTO emptied SELECT g, 1 FROM generate_series(1, 40000) g});
	my $session = $node->background_psql($db, on_error_stop => 0);
	my $file = "$tempdir/cancel." . $session->query_safe('SELECT pg_backend_pid()');

	$session->query_safe('BEGIN; TRUNCATE emptied');
	append_to_file($file, '');
	$session->query('COMMIT');
	like($session->{stderr}, $stops{cancel}, 'a COMMIT after TRUNCATE is cancelled while it pins keys');
	ok(!-e $file, 'which was asked for then');
	$session->{stderr} = '';
	is($session->query_safe('SELECT count(*), sum(count) FROM emptied'), '40000|40000', 'nothing is discarded');
	is(sql(q{SELECT sb_drain('emptied')}), 't', 'all can be stored');
	is(stored($node, $db, 'emptied'), 40000, 'and is stored once');
	wait_for($node, $db, q{SELECT keys = 0 FROM sb_stat_buffers WHERE buffer = 'emptied'}, 'no key is pinned any more');

	# without that it commits
	sql(q{INSERT INTO emptied SELECT g, 1 FROM generate_series(1, 40000) g});
	$session->query_safe('BEGIN; TRUNCATE emptied; COMMIT');
	is(sql(q{SELECT count(*) FROM emptied}), 0, 'without that it discards all');
	$session->quit;
}

# --- memory is out ------------------------------------------------------------

SKIP:
{
	skip 'memory cannot be made to run out with sanitizers', 1 if $has_sanitizers;

	make_buffer($node, $db, 'many', q{interval '1h', timeout '1h'});
	my $session = $node->background_psql($db, on_error_stop => 0);
	my $file = "$tempdir/out_of_memory." . $session->query_safe('SELECT pg_backend_pid()');
	my $failed = 0;
	my $failed_again = 0;
	my $wrong = 0;

	# Runs a statement while memory is out, and returns whether that showed.
	my $fails = sub {
		my ($statement) = @_;

		append_to_file($file, '');
		$session->{stderr} = '';
		$session->query($statement);
		my $error = $session->{stderr};
		$session->{stderr} = '';
		unlink $file or die "could not remove $file: $!";
		return 0 if $error eq '';
		$wrong++ if $error !~ /ERROR:  out of memory/;
		$session->query_safe('ROLLBACK TO s');
		return 1;
	};

	# What grows while keys are counted are the keys, their hash table, and the
	# records with which savepoints are undone, each at another moment.
	$session->query_safe('BEGIN');
	foreach my $i (1 .. 80)
	{
		my $insert = "INSERT INTO many SELECT '$i ' || g, 1 FROM generate_series(1, 500) g";

		$session->query_safe('SAVEPOINT s');
		next if !$fails->($insert);
		$failed++;
		$failed_again += $fails->(qq{SELECT sb_increment('again $i', 1, 'many')});

		# the savepoint has none of it, and can have it now
		$session->query_safe($insert);
		$wrong++ if $session->query_safe("SELECT sb_count('$i 1', 'many') + sb_count('1 500', 'many')") ne '2';
	}
	cmp_ok($failed, '>=', 5, 'memory runs out again and again');
	cmp_ok($failed_again, '>=', 1, 'also for what comes next in the transaction');
	is($wrong, 0, 'each time it is an error like others, and is undone');
	$session->query_safe('COMMIT');
	$session->quit;
	is(sql(q{SELECT count(*), sum(count) FROM many WHERE key NOT LIKE 'again%'}), '40000|40000', 'what did not fail is counted exactly');
	note "$failed failures, $failed_again of them twice";
}

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
