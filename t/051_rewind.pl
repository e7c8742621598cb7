# Switchover and failover as doc/operations.md has them: what an operator does
# so that nothing is lost when it is planned, what pg_rewind makes of counts
# that the old primary has saved, and how they are brought over before.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use File::Copy;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my $db = 'postgres';
my $saved = 'statbuffer.saved';

my %server;
$server{one} = PostgreSQL::Test::Cluster->new('one');
$server{one}->init(allows_streaming => 1);
$server{one}->append_conf('postgresql.conf', qq{
shared_preload_libraries = 'statbuffer'
max_worker_processes = 16
wal_log_hints = on
log_line_prefix = '%m [%p] %b %q%a '
});
$server{one}->start;
$server{one}->safe_psql($db, 'CREATE DATABASE other');

# Two buffers whose interval is longer than their timeout, so that they have no
# worker most of the time, and one that is flushed all the time.
my %buffers = (postgres => [qw(hourly busy)], other => ['hourly']);
foreach my $database (sort keys %buffers)
{
	$server{one}->safe_psql($database, q{
		CREATE EXTENSION statbuffer;
		CREATE TABLE totals (buffer text, key text, n bigint NOT NULL, PRIMARY KEY (buffer, key));
		CREATE FUNCTION store(buffer text, keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
			INSERT INTO totals SELECT buffer, * FROM unnest(keys, counts)
			ON CONFLICT (buffer, key) DO UPDATE SET n = totals.n + EXCLUDED.n
		$$;
	});
	foreach my $buffer (@{ $buffers{$database} })
	{
		my $interval = $buffer eq 'busy' ? '20ms' : '1h';
		$server{one}->safe_psql($database, qq{
			CREATE FUNCTION store_$buffer(keys text[], counts bigint[]) RETURNS void LANGUAGE sql
			AS \$\$ SELECT store('$buffer', keys, counts) \$\$;
			CREATE FOREIGN TABLE $buffer (key text NOT NULL, n bigint NOT NULL DEFAULT 1)
			SERVER statbuffer OPTIONS (handler 'store_$buffer', interval '$interval', timeout '0')});
	}
}

$server{one}->backup('backup');
$server{two} = PostgreSQL::Test::Cluster->new('two');
$server{two}->init_from_backup($server{one}, 'backup', has_streaming => 1);
$server{two}->start;
# each server keeps its own settings, whatever is copied over them
copy($_->data_dir . '/postgresql.conf', $_->basedir . '/postgresql.conf') foreach values %server;

# The application: each transaction counts in both buffers of a database, and
# some are rolled back.  Returns how often the rest was.
my $script = PostgreSQL::Test::Utils::tempdir . '/application.sql';
append_to_file($script, q{
\set k random(1, 20)
BEGIN;
SELECT sb_increment('k' || :k, 3, 'hourly');
SELECT sb_increment('k' || :k, 2, 'busy');
COMMIT;
BEGIN;
SELECT sb_increment('k' || :k, 1000000, 'hourly');
INSERT INTO busy VALUES ('k' || :k, 1000000);
ROLLBACK;
SELECT sb_async_increment('k' || :k, 1, 'busy');
});

sub application
{
	my ($node) = @_;
	my ($clients, $transactions) = (4, 100);

	$node->command_ok(
		[
			'pgbench', '-n', '-c', $clients, '-t', $transactions, '-f', $script,
			'-d', $node->connstr($db)
		],
		$node->name . ': the application counts');
	$node->safe_psql('other', q{SELECT sb_increment('k', 5, 'hourly')});
	return $clients * $transactions;
}

# What is stored: of a transaction of the application 3 in the one buffer and 3
# in the other, and 5 in the other database for each time that it ran.
sub totals
{
	my ($node) = @_;

	return join ' ',
	  map { $node->safe_psql($_, q{SELECT string_agg(buffer || '=' || n, ' ' ORDER BY buffer)
		FROM (SELECT buffer, sum(n) AS n FROM totals GROUP BY buffer) t}) } qw(postgres other);
}

# As it is told in operations: all buffers of all databases.
sub drain
{
	my ($node) = @_;

	return join ' ', map {
		$node->safe_psql($_, qq{
			SELECT string_agg(sb_drain(relid, '$patience')::text, ' ')
			FROM sb_stat_buffers WHERE state <> 'stopped'})
	} qw(postgres other);
}

sub has_saved
{
	my ($node) = @_;

	return -e $node->data_dir . "/$saved";
}

# The old primary becomes the standby of the new one.
sub rejoin
{
	my ($old, $new) = @_;

	copy($old->basedir . '/postgresql.conf', $old->data_dir . '/postgresql.conf');
	$old->enable_streaming($new);
	$old->set_standby_mode;
	$old->start;
}

sub rewind
{
	my ($old, $new) = @_;

	# Up to 15 pg_rewind takes the timeline of a server that has just been
	# promoted from its control file, which has the former one until the first
	# checkpoint.
	$new->safe_psql($db, 'CHECKPOINT');
	command_ok(
		[
			'pg_rewind', '--no-sync', '-D', $old->data_dir,
			'--source-server', $new->connstr($db),
			'--config-file', $old->basedir . '/postgresql.conf'
		],
		$old->name . ': pg_rewind');
}

# --- a planned switchover, there and back -----------------------------------

my ($old, $new) = @server{qw(one two)};
my $done = 0;

foreach my $round (1, 2)
{
	my $name = "switchover $round";

	$done += application($old);
	wait_for($old, $db, q{
			SELECT bool_and(pid IS NULL) AND sum(pending + in_flight) FILTER (WHERE buffer = 'busy') = 0
			FROM sb_stat_buffers},
		"$name: everything is as it should be, and no buffer has a worker");

	# Who does not drain has the stop flush nothing of a buffer without a
	# worker, however much time it has: it is saved.
	my $log = -s $old->logfile;
	my $held = $old->safe_psql($db, 'SELECT sum(n) FROM hourly');
	my $stored = totals($old);
	$old->stop('fast');
	is(lines_in_log($old, 'statbuffer has saved counts that are not yet stored', $log), 1,
		"$name: a stop without a drain saves what a buffer without a worker holds");
	ok(has_saved($old), "$name: to the file");

	# That is the time to see it, and to start the same server once more.
	$log = -s $old->logfile;
	$old->start;
	is($old->safe_psql($db, 'SELECT sum(n) FROM hourly'), $held, "$name: the same server has it again");
	is(totals($old), $stored, "$name: it was not stored");
	unlike(drain($old), qr/false/, "$name: all buffers are drained");
	is($old->safe_psql($_, q{SELECT buffer, k.* FROM sb_stat_buffers, sb_keys(relid) AS k
			WHERE k.count <> 0 OR k.in_flight <> 0}),
		'', "$name: nothing is held in $_") foreach qw(postgres other);
	$old->wait_for_catchup($new->name);
	$old->stop('fast');
	is(lines_in_log($old, 'statbuffer has saved counts', $log), 0, "$name: this time nothing is saved");
	ok(!has_saved($old), "$name: there is no file");

	# The standby has all of the primary's WAL, so what follows loses nothing.
	$new->promote;
	wait_for($new, $db, 'SELECT NOT pg_is_in_recovery()', "$name: promoted");
	my $expected = sprintf 'busy=%d hourly=%d hourly=%d', 3 * $done, 3 * $done, 5 * $round;
	is(totals($new), $expected, "$name: the new primary has what was counted, exactly");

	rewind($old, $new) if $round == 2;
	rejoin($old, $new);
	$new->wait_for_catchup($old->name);
	is(totals($old), $expected, "$name: so has the old one, as a standby");
	($old, $new) = ($new, $old);
}

$done += application($old);
unlike(drain($old), qr/false/, 'the first one counts again');
my $expected = sprintf 'busy=%d hourly=%d hourly=%d', 3 * $done, 3 * $done, 15;
is(totals($old), $expected, 'and everything is stored once');
$old->wait_for_catchup($new->name);
is(totals($new), $expected, 'on both');

# --- an unplanned failover, and the old primary is still there ----------------

# The primary is cut off: it goes on, and holds counts when it is stopped.  With
# statbuffer.max_shutdown at 0, nothing of a buffer that has a worker is flushed
# into tables that will be rewound either.
is($old->safe_psql($db, qq{
		ALTER FOREIGN TABLE hourly OPTIONS (SET timeout '1h');
		SELECT sb_drain('hourly', '$patience')}), 't', 'failover: a worker is there');
$old->wait_for_catchup($new->name);
$old->safe_psql($db, q{INSERT INTO hourly VALUES ('k1', 7), ('k2', 70), ('gone', -1)});
$old->safe_psql('other', q{INSERT INTO hourly VALUES ('k', 700)});
$new->promote;
wait_for($new, $db, 'SELECT NOT pg_is_in_recovery()', 'failover: promoted');
is($new->safe_psql($db, q{SELECT sb_increment('k1', 1, 'hourly'); SELECT sum(n) FROM hourly}), "1\n1",
	'failover: the new primary knows nothing of what the old one holds');
is($old->safe_psql($db, q{SELECT state FROM sb_stat_buffers WHERE buffer = 'hourly'}), 'running', 'failover: the worker is still there');
$old->append_conf('postgresql.conf', 'statbuffer.max_shutdown = 0');
$old->reload;
wait_for($old, $db, q{SELECT current_setting('statbuffer.max_shutdown') = '0'}, 'failover: the setting is in force');
$old->stop('fast');
ok(has_saved($old), 'failover: the old one has saved it');

# Alone, with no slot for a worker, it shows what it holds and stores none of it.
my $stored = totals($new);
$old->append_conf('postgresql.conf', q{
max_worker_processes = 1
max_logical_replication_workers = 0
});
my $log = -s $old->logfile;
$old->start;
my %rows = map { $_ => $old->safe_psql($_, 'COPY (SELECT * FROM hourly ORDER BY key) TO stdout') } qw(postgres other);
is($rows{postgres}, "gone\t-1\nk1\t7\nk2\t70", 'failover: it can be copied from there');
is($rows{other}, "k\t700", 'failover: from each database');
$old->safe_psql($db, q{SELECT sb_flush_all('hourly')});
$old->wait_for_log(qr/out of background worker slots/, $log);
is($old->safe_psql($db, 'SELECT count(*) FROM hourly'), 3, 'failover: it stays there, due or not');
is(totals($old), $stored, 'failover: nothing of it was stored');
$old->stop('fast');
ok(has_saved($old), 'failover: the old one has saved it again');

# pg_rewind removes what the new primary does not have.
rewind($old, $new);
ok(!has_saved($old), 'failover: pg_rewind deletes the file');
is_deeply([ glob($old->data_dir . "/$saved*") ], [], 'failover: and sets nothing aside');
rejoin($old, $new);
$new->wait_for_catchup($old->name);
is($old->safe_psql($db, 'SELECT count(*) FROM hourly'), 0, 'failover: as a standby it holds nothing');

# What was copied is counted at the new primary.
foreach my $database (qw(postgres other))
{
	append_to_file($old->basedir . "/$database.tsv", "$rows{$database}\n");
	$new->safe_psql($database, '\copy hourly FROM ' . $old->basedir . "/$database.tsv");
}
unlike(drain($new), qr/false/, 'failover: the new primary stores');
$expected = sprintf 'busy=%d hourly=%d hourly=%d', 3 * $done, 3 * $done + 77, 15 + 700;
is(totals($new), $expected, 'failover: what was brought over, once');

# --- a standby that has its own file ------------------------------------------

# Without pg_rewind the file of a former primary stays where it is, is not read
# while the server is a standby, and is set aside when it is promoted.
$new->safe_psql($db, q{ALTER FOREIGN TABLE hourly OPTIONS (SET timeout '0')});
wait_for_no_worker($new, 'a switchover without a drain: no worker is there');
$new->safe_psql($db, q{INSERT INTO hourly VALUES ('left behind', 9)});
$new->stop('fast');
ok(has_saved($new), 'a switchover without a drain: there is a file');
$old->promote;
wait_for($old, $db, 'SELECT NOT pg_is_in_recovery()', 'a switchover without a drain: promoted');
rejoin($new, $old);
$old->wait_for_catchup($new->name);
ok(has_saved($new), 'a switchover without a drain: the file stays when the server becomes a standby');
is($new->safe_psql($db, q{SELECT count(*) FROM hourly}), 0, 'a switchover without a drain: it is not read');
$old->stop('fast');
$new->promote;
$new->wait_for_log(qr/cannot use file "[^"]*statbuffer\.saved" with counts of the last shutdown\n.*DETAIL: .*belongs to timeline/);
ok(!has_saved($new), 'a switchover without a drain: it is set aside when the server is promoted');
my @aside = glob($new->data_dir . "/$saved.*");
is(scalar(@aside), 1, 'a switchover without a drain: under another name');

$new->stop;
done_testing();
