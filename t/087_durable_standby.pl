# Durable buffers and standbys: what a standby shows, and what is there when it is
# promoted, while the primary goes on and rotates its ledger; and backups: restored
# as they are, and up to a moment between an increment and its flush.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $primary = PostgreSQL::Test::Cluster->new('primary');
$primary->init(allows_streaming => 1, has_archiving => 1);
$primary->append_conf('postgresql.conf', qq{
shared_preload_libraries = 'statbuffer'
max_prepared_transactions = 10
statbuffer.ledger_size = 1MB
log_line_prefix = '%m [%p] %b %q%a '
});
$primary->start;
$primary->safe_psql($db, q{
CREATE EXTENSION statbuffer;
CREATE TABLE t (k text PRIMARY KEY, n bigint NOT NULL DEFAULT 0);
SELECT sb_create('hits', 't', 'n', 'durable=true', 'interval=1h');
INSERT INTO hits VALUES ('a', 1), ('b', 10);
});
$primary->backup('backup');
my $standby = PostgreSQL::Test::Cluster->new('standby');
$standby->init_from_backup($primary, 'backup', has_streaming => 1);
$standby->start;

# What `hits' holds, as one line, at a server.
sub held
{
	my ($node) = @_;

	return $node->safe_psql($db, q{SELECT string_agg(k || n, ' ' ORDER BY k) FROM hits});
}

# Likewise, what the keys have altogether: what is recovered is due at once.
sub totals
{
	my ($node, @keys) = @_;

	return join ' ', map { $_ . $node->safe_psql($db, "SELECT sb_total('$_', 'hits')") } @keys;
}

# --- what it shows ----------------------------------------------------------

is(held($standby), 'a1 b10', 'a standby shows what a backup has');
$primary->safe_psql($db, q{INSERT INTO hits VALUES ('a', 2), ('c', 100)});
$primary->wait_for_catchup($standby);
is(held($standby), 'a3 b10 c100', 'and what is counted after it');
my ($status, $out, $err) = $standby->psql($db,
	q{SELECT sb_count('a', 'hits'), sb_count('x', 'hits') IS NULL, sb_total('a', 'hits')});
is($out, '3|t|3', 'so do sb_count() and sb_total()');
is($err, '', 'without a warning');

$primary->safe_psql($db, q{SELECT sb_flush('a', 'hits'); SELECT sb_drain('hits'); INSERT INTO hits VALUES ('a', 4)});
$primary->wait_for_catchup($standby);
is(held($standby), 'a4', 'what was stored is no longer shown');
is($standby->safe_psql($db, q{SELECT sb_count('a', 'hits'), sb_total('a', 'hits'), sb_total('c', 'hits')}),
	'4|7|100', 'but it is in the total');
$primary->safe_psql($db, q{BEGIN; INSERT INTO hits VALUES ('p', 1); PREPARE TRANSACTION 'p'});
$primary->wait_for_catchup($standby);
is(held($standby), 'a4', 'what is prepared is not shown');
$primary->safe_psql($db, q{COMMIT PREPARED 'p'});
$primary->wait_for_catchup($standby);
is(held($standby), 'a4 p1', 'until it is committed');

# Rotations on the primary, while somebody reads here.  The sum never goes down.
my $reader = start_session($standby, $db, map { 'SELECT coalesce(sum(n), 0) FROM hits' } 1 .. 300);
for my $i (1 .. 40)
{
	$primary->safe_psql($db,
		q{SELECT count(sb_async_increment('k' || i, 1, 'hits')) FROM generate_series(1, 1000) AS i});
}
finish_session($reader, 'a reader was never cancelled');
my @sums = grep { /^\d+$/ } split /\n/, $reader->{out};
is(scalar @sums, 300, 'it has read each time');
is(join(' ', @sums), join(' ', sort { $a <=> $b } @sums), 'and never saw less than before');
$primary->wait_for_catchup($standby);
is($standby->safe_psql($db, 'SELECT sum(n) FROM hits'), 40005, 'it sees all in the end');
cmp_ok($primary->safe_psql($db, q{SELECT pg_relation_size('sb_ledger_0') + pg_relation_size('sb_ledger_1')}),
	'<', 4 * 1024 * 1024, 'and the ledger was rotated');

# --- a moment to restore up to ----------------------------------------------

$primary->safe_psql($db, q{TRUNCATE hits; UPDATE t SET n = 0; INSERT INTO hits VALUES ('a', 5)});
my $moment = $primary->safe_psql($db, q{SELECT pg_create_restore_point('counted')});
$primary->safe_psql($db, q{SELECT sb_drain('hits'); INSERT INTO hits VALUES ('a', 1000); SELECT pg_switch_wal()});
my $restored = PostgreSQL::Test::Cluster->new('restored');
$restored->init_from_backup($primary, 'backup', has_restoring => 1, standby => 0);
$restored->append_conf('postgresql.conf', qq{
recovery_target_name = 'counted'
recovery_target_action = 'promote'
});
$restored->start;
wait_for($restored, $db, 'SELECT NOT pg_is_in_recovery()', 'restored up to a moment before the flush');
is(totals($restored, 'a'), 'a5', 'what was held then');
$restored->safe_psql($db, q{SELECT sb_drain('hits')});
is($restored->safe_psql($db, q{SELECT n FROM t WHERE k = 'a'}), 5, 'which is stored once');
$restored->stop;

# --- promotion --------------------------------------------------------------

$primary->safe_psql($db, q{
	INSERT INTO hits VALUES ('d', 7);
	BEGIN; INSERT INTO hits VALUES ('q', 3); PREPARE TRANSACTION 'q'});
$primary->wait_for_catchup($standby);
$primary->stop('immediate');
$standby->promote;
is(totals($standby, 'a', 'd'), 'a1005 d7', 'promoted: what the primary held');
$standby->safe_psql($db, q{INSERT INTO hits VALUES ('d', 1)});
$standby->safe_psql($db, q{COMMIT PREPARED 'q'});
is(totals($standby, 'a', 'd', 'q'), 'a1005 d8 q3', 'it counts, and commits what was prepared on the primary');
is($standby->safe_psql($db, q{SELECT sb_drain('hits')}), 't', 'and flushes');
is($standby->safe_psql($db, q{SELECT string_agg(k || n, ' ' ORDER BY k) FROM t WHERE k IN ('a', 'd', 'q')}),
	'a1005 d8 q3', 'each is stored once');
$standby->stop('immediate');
$standby->start;
is(held($standby), '', 'and nothing is held after a crash');
has_not_crashed($standby, 'no process has crashed');
$standby->stop;
done_testing();
