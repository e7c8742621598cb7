# Transactions that count a great many keys: they take them in the same order
# whatever the session has done before, and they can be cancelled until they
# commit.

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

my $node = new_node('large', 'statbuffer.max_workers = 4');

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
wait_for($node, $db, q{SELECT keys = 20000 FROM sb_stat_buffers WHERE buffer = 'stopped'::regclass}, 'no key stays that was made in vain');
is(sql(q{TRUNCATE written; SELECT sb_drain('stopped')}), 't', 'all can be stored');
is(stored($node, $db, 'stopped'), 20000, 'and is stored once');

has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
