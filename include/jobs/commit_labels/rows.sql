SELECT
    commit_id,
    repository,
    COALESCE(subject, '') AS subject,
    COALESCE(body, '') AS body  -- most commits have none, and a null would reject the row
FROM commits
WHERE committed_at >= :interval_start
  AND committed_at < :interval_end
ORDER BY commit_id
