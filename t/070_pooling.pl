# Transaction pooling: many clients share a few server connections, and each
# transaction may come over another one.  Nothing of ours is tied to a session,
# so counts are as exact as without.

use strict;
use warnings;

use FindBin;
use lib $FindBin::RealBin;

use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use StatbufferTest;
use Test::More;

my ($pgbouncer) = grep { -x } map { "$_/pgbouncer" } split(/:/, $ENV{PATH}), '/usr/sbin', '/usr/local/sbin';

plan skip_all => 'pgbouncer is not installed' unless $pgbouncer;

my $db = 'postgres';
my $node = new_node('pooled', 'statbuffer.max_workers = 12');

# Each transaction writes to the ledger what it counts, and over which server
# connection it came.
sql(q{
	CREATE TABLE ledger (buffer text, key text, n bigint, pid int DEFAULT pg_backend_pid());
	CREATE TABLE stored (buffer text, key text, n bigint, PRIMARY KEY (buffer, key));
	CREATE FUNCTION store_hits(keys text[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
		INSERT INTO stored AS s SELECT 'hits', k, n FROM unnest(keys, counts) AS u (k, n)
		ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n
	$$;
	CREATE FUNCTION store_pairs(a int, b text, count bigint) RETURNS void LANGUAGE sql AS $$
		INSERT INTO stored AS s VALUES ('pairs', a || ' ' || b, count)
		ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n
	$$;
	CREATE FOREIGN TABLE hits (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_hits', interval '50ms');
	CREATE FOREIGN TABLE pairs (a int NOT NULL, b text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_pairs', interval '50ms', jitter '50ms');
	CREATE SEQUENCE undone;
});

# --- the pooler -------------------------------------------------------------

# One server in several guises: transactions over three connections, with the
# connection reset after each of them, or not; over a single one; and single
# statements.
my $server = sprintf 'host=%s port=%d dbname=%s user=%s', $node->host, $node->port, $db, $node->safe_psql($db, 'SELECT current_user');
my $port = PostgreSQL::Test::Cluster::get_free_port();
my %pooler;

sub start_pooler
{
	my ($name, $port, $always) = @_;
	my $base = $node->basedir . "/$name";

	append_to_file("$base.ini", qq{
[databases]
pool = $server pool_size=3
single = $server pool_size=1
statements = $server pool_size=2 pool_mode=statement

[pgbouncer]
listen_addr =
listen_port = $port
unix_socket_dir = @{[ $node->host ]}
auth_type = any
pool_mode = transaction
max_client_conn = 200
server_reset_query = DISCARD ALL
server_reset_query_always = $always
query_wait_timeout = 120
logfile = $base.log
pidfile = $base.pid
});
	$pooler{$name} = {
		port => $port,
		log => "$base.log",
		run => IPC::Run::start([ $pgbouncer, '-q', "$base.ini" ], '<', \undef, '>', '/dev/null', '2>', '/dev/null') };
	foreach (1 .. 10 * $PostgreSQL::Test::Utils::timeout_default)
	{
		return if -S $node->host . "/.s.PGSQL.$port";
		last unless $pooler{$name}{run}->pumpable;
		select undef, undef, undef, 0.1;
	}
	BAIL_OUT("pgbouncer did not start: " . (-e "$base.log" ? slurp_file("$base.log") : 'no log'));
}

sub stop_poolers
{
	foreach my $pooler (values %pooler)
	{
		$pooler->{run}->signal('TERM');
		$pooler->{run}->finish;
	}
	%pooler = ();
}

# However the test ends, they end.
END
{
	my $status = $?;

	stop_poolers();
	$? = $status;
}

start_pooler('plain', $port, 0);
start_pooler('reset', PostgreSQL::Test::Cluster::get_free_port(), 1);

# Runs statements over a connection to the pooler.
sub pooled
{
	my ($guise, $statements, $name) = @_;

	return $node->safe_psql($db, $statements,
		connstr => sprintf('host=%s port=%d dbname=%s user=anybody', $node->host, $pooler{ $name // 'plain' }{port}, $guise));
}

sub pooled_session
{
	my ($guise) = @_;
	my $session = { in => '', out => '', err => '' };

	$session->{run} = IPC::Run::start(
		[ 'psql', '-XAtq', '-d', sprintf('host=%s port=%d dbname=%s user=anybody', $node->host, $pooler{plain}{port}, $guise) ],
		'<', \$session->{in}, '>', \$session->{out}, '2>', \$session->{err},
		IPC::Run::timeout($PostgreSQL::Test::Utils::timeout_default));
	return $session;
}

# Has a session run statements, and returns what they return.
sub in_session
{
	my ($session, $statements) = @_;

	$session->{out} = '';
	$session->{in} .= "$statements;\n\\echo over\n";
	$session->{run}->pump until $session->{out} =~ /^over$/m;
	return $session->{out} =~ s/\n?over\n//r;
}

sub end_session
{
	my ($session) = @_;

	$session->{in} .= "\\q\n";
	$session->{run}->finish;
	return;
}

# --- counts are exact -------------------------------------------------------

# What was committed is what was stored, and nothing else, key by key.
sub reconcile
{
	my ($what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	is(pooled('pool', "SELECT sb_drain('hits'), sb_drain('pairs')"), 't|t', "$what: drained, over the pooler");
	sql(q{INSERT INTO ledger SELECT 'hits', 'undone', last_value FROM undone WHERE is_called;
		SELECT setval('undone', 1, false)});
	is(sql(q{
			SELECT buffer, key, l.n AS ledger, s.n AS stored
			FROM (SELECT buffer, key, sum(n) AS n FROM ledger GROUP BY 1, 2) l
				FULL JOIN (SELECT * FROM stored WHERE buffer <> 'numbers') s USING (buffer, key)
			WHERE coalesce(l.n, 0) <> coalesce(s.n, 0) ORDER BY 1, 2 LIMIT 20}),
		'', "$what: each key has what the ledger says");
	is(sql('SELECT count(*) FROM (SELECT FROM hits UNION ALL SELECT FROM pairs) held'), '0', "$what: nothing is held");
}

my %script = (
	commit => q{
\set k random(1, 20)
\set n random(-2, 9)
BEGIN;
SELECT sb_increment('key ' || :k::int, :n, 'hits');
INSERT INTO ledger VALUES ('hits', 'key ' || :k::int, :n);
SELECT sb_increment(ROW(:k::int, 'x'), 1, 'pairs');
INSERT INTO pairs VALUES (:k, 'x', 2), (:k, 'y', 3);
INSERT INTO ledger VALUES ('pairs', :k::int || ' x', 3), ('pairs', :k::int || ' y', 3);
COMMIT;
},
	savepoints => q{
\set k random(1, 20)
BEGIN;
SELECT sb_increment('hot', 1, 'hits');
SAVEPOINT s;
SELECT sb_increment('hot', 1000, 'hits'), sb_increment('key ' || :k::int, 1000, 'hits');
ROLLBACK TO s;
SELECT sb_increment(ROW(:k::int, 'z'), 1, 'pairs');
INSERT INTO ledger VALUES ('hits', 'hot', 1), ('pairs', :k::int || ' z', 1);
COMMIT;
},
	rollback => q{
BEGIN;
SELECT sb_increment('hot', 1000000, 'hits');
SELECT sb_async_increment('undone', 1, 'hits'), nextval('undone');
ROLLBACK;
},
	alone => q{
\set k random(1, 20)
WITH l AS (INSERT INTO ledger VALUES ('hits', 'alone ' || :k::int, 1) RETURNING key)
SELECT sb_increment(key, 1, 'hits') FROM l;
},
	look => q{
SELECT sb_count('hot', 'hits');
SELECT count(*), sum(count) FROM hits;
});
my @scripts;
for my $name (sort keys %script)
{
	my $file = $node->basedir . "/$name.sql";

	append_to_file($file, $script{$name});
	push @scripts, '-f', $file;
}

my $transactions = sized(60, 5);

# Sixteen clients on three connections.  Whoever comes next, comes over
# whatever connection is free.
sub pgbench
{
	my ($name, $guise, $mode, $clients, $what) = @_;

	local $Test::Builder::Level = $Test::Builder::Level + 1;
	command_checks_all(
		[
			'pgbench', '-n', '-M', $mode, '-c', $clients, '-j', 2, '-t', $transactions, @scripts,
			'-h', $node->host, '-p', $pooler{$name}{port}, '-U', 'anybody', $guise
		],
		0,
		[ qr{transactions actually processed: @{[ $transactions * $clients ]}/@{[ $transactions * $clients ]}} ],
		[ qr{^} ],
		$what);
	reconcile($what);
}

pgbench('plain', 'pool', 'simple', 16, '16 clients on three connections');
cmp_ok(sql(q{SELECT count(DISTINCT pid) FROM ledger WHERE key <> 'undone'}), '<=', 3, 'there were not more');
sql('UPDATE ledger SET pid = 0');
pgbench('plain', 'single', 'simple', 8, '8 clients on a single one');
is(sql("SELECT count(DISTINCT pid) FROM ledger WHERE pid <> 0 AND key <> 'undone'"), '1', 'there was one');
pgbench('reset', 'pool', 'simple', 16, 'connections that are reset after each transaction');

# The extended protocol, as drivers use it, goes as well, without statements
# that are prepared once and used over another connection.
pgbench('plain', 'pool', 'extended', 8, 'the extended protocol');

# Statements of their own.
pooled('statements', join ';', map {
		"WITH l AS (INSERT INTO ledger VALUES ('hits', 'statement', $_) RETURNING key, n) SELECT sb_increment(key, n, 'hits') FROM l" } 1 .. 50);
reconcile('single statements');
is(sql(q{SELECT n FROM stored WHERE key = 'statement'}), '1275', 'they are counted');

# --- nothing of ours stays with the connection ------------------------------

# Two clients take turns on one connection.  What one has not committed, the
# other does not see; nor what it has rolled back, or left without a word.
sql(q{
	CREATE FOREIGN TABLE turns (key text NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_hits', interval '1h', timeout '1h')});
my $one = pooled_session('single');
my $two = pooled_session('single');
is(in_session($one, 'SELECT pg_backend_pid()'), in_session($two, 'SELECT pg_backend_pid()'), 'two clients share a connection');
in_session($one, q{BEGIN; SELECT sb_increment('k', 1, 'turns'); SAVEPOINT s; SELECT sb_increment('k', 10, 'turns'); ROLLBACK});
is(in_session($two, q{SELECT sb_count('k', 'turns') IS NULL OR sb_count('k', 'turns') = 0}), 't', 'the second does not see what the first rolled back');
in_session($one, q{BEGIN; SELECT sb_increment('k', 2, 'turns'); COMMIT});
is(in_session($two, q{BEGIN; SELECT sb_increment('k', 3, 'turns'); SELECT sb_count('k', 'turns'); COMMIT}), "3\n5", 'it does see what it committed, with its own');
is(in_session($one, q{SELECT sb_count('k', 'turns')}), '5', 'as does the first');

# An error in the middle, and what comes after it.
in_session($one, q{BEGIN; SELECT sb_increment('k', 100, 'turns'); SELECT 1 / 0; COMMIT});
is(in_session($two, q{SELECT sb_increment('k', 1, 'turns'); SELECT sb_count('k', 'turns')}), "1\n6", 'an error of the first does not concern the second');

# The reset of a session is harmless, though it forgets all that it can.
in_session($one, q{SELECT sb_increment('k', 1, 'turns')});
for my $statement ('DISCARD ALL', 'DISCARD PLANS', 'DISCARD TEMP', 'RESET ALL', 'DEALLOCATE ALL', 'CLOSE ALL', 'UNLISTEN *')
{
	in_session($one, $statement);
	is(in_session($two, q{SELECT sb_increment('k', 1, 'turns'); SELECT sb_count('k', 'turns') > 7}), "1\nt", "$statement is harmless");
}
is(in_session($one, q{SELECT sb_count('k', 'turns')}), '14', 'nothing was lost by them');
in_session($one, q{BEGIN; SELECT sb_increment('k', 1, 'turns'); CLOSE ALL; DEALLOCATE ALL; RESET ALL; COMMIT});
is(in_session($two, q{SELECT sb_count('k', 'turns')}), '15', 'in the middle of a transaction, too');

# A client vanishes in the middle of a transaction.
in_session($one, q{BEGIN; SELECT sb_increment('k', 1000, 'turns'); SELECT sb_async_increment('k', 1, 'turns')});
$one->{run}->signal('KILL');
$one->{run}->finish;
is(in_session($two, q{SELECT sb_count('k', 'turns')}), '16', 'a client that vanishes has not committed');

# --- what others do to a buffer is seen over every connection ---------------

# Each of the three has used it before.
my @three = map { pooled_session('pool') } 1 .. 3;
in_session($_, q{BEGIN; SELECT sb_increment('k', 1, 'turns')}) for @three;
in_session($_, q{COMMIT}) for @three;
sql(q{SELECT sb_stop('turns')});
like(pooled_error($_), qr/buffer "turns" is stopped/, 'a buffer that is stopped is so for every connection') for @three;
sql(q{SELECT sb_start('turns')});
in_session($_, q{BEGIN; SELECT sb_increment('k', 1, 'turns')}) for @three;
in_session($_, q{COMMIT}) for @three;
sql(q{SELECT sb_drain('turns')});

# Dropped and made anew, with other columns.
sql(q{
	DROP FOREIGN TABLE turns;
	CREATE FUNCTION store_numbers(keys int[], counts bigint[]) RETURNS void LANGUAGE sql AS $$
		INSERT INTO stored AS s SELECT 'numbers', k, n FROM unnest(keys, counts) AS u (k, n)
		ON CONFLICT (buffer, key) DO UPDATE SET n = s.n + EXCLUDED.n
	$$;
	CREATE FOREIGN TABLE turns (key int NOT NULL, count bigint NOT NULL DEFAULT 1)
	SERVER statbuffer OPTIONS (handler 'store_numbers', interval '1h')});
in_session($_, q{BEGIN; SELECT sb_increment('7', 1, 'turns'); SELECT sb_increment(8, 1, 'turns')}) for @three;
in_session($_, q{COMMIT}) for @three;
is(pooled('pool', q{SELECT sb_count(7, 'turns'), sb_count('8', 'turns'), sb_drain('turns')}), '3|3|t', 'one that was made anew is so, too');
is(sql(q{SELECT key, n FROM stored WHERE buffer = 'numbers' ORDER BY key}), "7|3\n8|3", 'its counts are stored');
end_session($_) for $two, @three;

sub pooled_error
{
	my ($session) = @_;

	$session->{err} = '';
	in_session($session, q{SELECT sb_increment('k', 1, 'turns')});
	$session->{run}->pump until $session->{err} =~ /ERROR.*\n/;
	return $session->{err};
}

# --- connections break ------------------------------------------------------

# The server's end is cut off again and again.  Clients whose transaction was
# in it are sent away by the pooler; the others get another connection.
sql(q{DELETE FROM ledger; DELETE FROM stored WHERE buffer IN ('hits', 'pairs')});
$ENV{PGAPPNAME} = 'load';
my @rough = map {
	IPC::Run::start(
		[
			'pgbench', '-n', '-M', 'simple', '-c', 4, '-T', 3600, '-f', $node->basedir . '/commit.sql',
			'-f', $node->basedir . '/savepoints.sql',
			'-h', $node->host, '-p', $pooler{plain}{port}, '-U', 'anybody', 'pool'
		],
		'<', \undef, '>', '/dev/null', '2>', '/dev/null')
} 1 .. 4;
delete $ENV{PGAPPNAME};
my $cut = 0;
for (1 .. 40)
{
	$cut += sql(q{
		SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (
			SELECT pid FROM pg_stat_activity
			WHERE application_name = 'load' AND backend_type = 'client backend' ORDER BY random() LIMIT 1) p});
	select undef, undef, undef, 0.05;
	last unless grep { $_->pumpable } @rough;
}
foreach my $run (@rough)
{
	$run->signal('TERM') if $run->pumpable;
	$run->finish;
}
cmp_ok($cut, '>', 0, "server connections were cut off: $cut");
wait_for($node, $db, q{SELECT count(*) = 0 FROM pg_stat_activity WHERE application_name = 'load' AND state <> 'idle'}, 'no transaction is left');
cmp_ok(sql('SELECT count(*) FROM ledger'), '>', 0, 'clients have counted meanwhile');
reconcile('connections that are cut off');

stop_poolers();
has_not_crashed($node, 'no process has crashed');
$node->stop;
done_testing();
